"""`python -m benchmarks.heads`: what cheaper local heads save in time and cost in loss, on tiny-shakespeare.

The GPT of `make bench` trains on the text in words of one or two characters, which are as many as its
vocabulary, end to end and with `dgl` at K = 12 and several heads. All start from the same weights and take
the same steps on the same batches, in turn; the ratio of times is taken within each step. The loss is that of
the network's own output on the last tenth of the text, in nats a word.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import locc
from benchmarks.handwritten import EndToEnd
from benchmarks.meter import Timing, flops, interleave, ratio
from benchmarks.models import BLOCKS, gpt, splits, token_loss
from locc.reproduce.data import default_folder

VOCABULARY, LENGTH, BATCH, TESTS = 384, 64, 8, 128

HEADS: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear"},
    "sr (a quarter of the positions)": {"head": "sr"},
    "sr, an eighth": {"head": "sr", "positions": 1 / 8},
    "bottleneck (rank 64)": {"head": "bottleneck"},
    "unembedding": {"head": "unembedding"},
}


def words(text: str) -> Tensor:
    """Return a text as ids of its characters and of its most frequent pairs of them, read from the left."""
    letters = sorted(set(text))
    pairs = Counter(map("".join, pairwise(text)))
    known = [*letters, *(pair for pair, _ in pairs.most_common(VOCABULARY - len(letters)))]
    ids, found, at = {word: i for i, word in enumerate(known)}, list[int](), 0
    while at < len(text):
        word = text[at : at + 2] if text[at : at + 2] in ids else text[at]
        found.append(ids[word])
        at += len(word)
    return torch.tensor(found)


def windows(ids: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` random windows of a text, and the words that follow, each [count, LENGTH]."""
    starts = torch.randint(len(ids) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    x = ids[starts + torch.arange(LENGTH)]
    return x, ids[starts + 1 + torch.arange(LENGTH)]


def measure(folder: Path, steps: int, chosen: Sequence[str]) -> list[str]:
    """Train all contestants and return the rows of the table."""
    ids = words((folder / "tinyshakespeare.txt").read_text())
    train, test = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    torch.manual_seed(0)
    models = {"end-to-end": gpt(vocabulary=VOCABULARY, length=LENGTH)}
    models |= {name: copy.deepcopy(models["end-to-end"]) for name in chosen}
    trainers: dict[str, Callable[[Tensor, Tensor], object]] = {
        "end-to-end": EndToEnd(models["end-to-end"], token_loss).step
    }
    for name in chosen:
        program = locc.compile(
            models[name],
            "dgl",
            splits(BLOCKS),
            loss=token_loss,
            example_inputs=train[: 2 * LENGTH].reshape(2, LENGTH),
            optimizer=locc.Recipe(),
            seed=0,
            verify=False,
            **HEADS[name],
        )
        trainers[name] = program.step
    done = dict.fromkeys(models, 0)

    def stepping(name: str) -> Callable[[], object]:
        def step() -> object:
            done[name] += 1
            return trainers[name](*windows(train, BATCH, done[name]))

        return step

    times = interleave({name: stepping(name) for name in models}, steps - 1, warmup=1)
    x, y = windows(test, TESTS, 0)
    rows, whole = list[str](), 0
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            loss = float(token_loss(model(x), y))
        model.train()
        whole = whole or flops(stepping(name))
        operations = flops(stepping(name)) / whole
        relative: Timing = ratio(times, name, "end-to-end")
        quartiles = sorted(a / b for a, b in zip(times[name], times["end-to-end"], strict=True))
        low, high = quartiles[len(quartiles) // 4], quartiles[3 * len(quartiles) // 4]
        rows.append(
            f"| {name} | {relative.median:.2f} ({low:.2f} to {high:.2f}) | {operations:.2f} | {loss:.3f} |"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--data", type=Path, default=default_folder(), help="folder of tinyshakespeare.txt")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    given = parser.parse_args(arguments)
    print(f"{given.steps} steps of {BATCH} x {LENGTH} words; time: median, quartiles")
    print("| heads | time / end-to-end | arithmetic / end-to-end | test loss |")
    print("|---|---|---|---|")
    for row in measure(given.data, given.steps, given.heads):
        print(row, flush=True)


if __name__ == "__main__":
    main()
