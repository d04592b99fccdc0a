"""`python -m benchmarks.stacked`: modules of one structure as one (`backend="vmap"`) against one by one.

An MLP of twelve equal layers (`benchmarks.models.mlp`; `mlp-small` at width 512, batch 64) trains with `dgl`
and Adam on waves of batches: under `backend="vmap"`, and in lock-step, each on its own copy, in turn. Beside
them runs what neither can do without, on stacked tensors: the matrix products of a step, and one update of
all parameters. Times are of the processor, for a batch; a ratio is taken within each round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import locc
from benchmarks.meter import Timing, interleave, ratio
from benchmarks.models import BLOCKS, CLASSES, mlp, splits


def arithmetic(width: int, batch: int) -> Callable[[], None]:
    """Return what runs the matrix products of a step and the update of the parameters, and nothing else."""
    x, hidden = torch.randn(2, BLOCKS, batch, width)
    logits, layer = torch.randn(BLOCKS, batch, CLASSES), torch.randn(BLOCKS, width, width)
    head = torch.randn(BLOCKS, CLASSES, width)
    parameters = torch.randn(BLOCKS, width * width + width + CLASSES * width + CLASSES, requires_grad=True)
    parameters.grad = torch.randn_like(parameters)
    optimizer = torch.optim.Adam([parameters], fused=True)

    def run() -> None:
        torch.bmm(x, layer.mT)
        torch.bmm(hidden, head.mT)
        torch.bmm(logits, head)
        torch.bmm(logits.mT, hidden)
        torch.bmm(hidden.mT, x)
        optimizer.step()

    return run


def measure(width: int, batch: int, wave: int, rounds: int) -> str:
    """Return a row of the table."""
    data = [(torch.randn(batch, width), torch.randint(CLASSES, (batch,))) for _ in range(wave)]

    def program(**options: Any) -> locc.Program:
        torch.manual_seed(0)
        x = data[0][0]
        given = {"example_inputs": x, "optimizer": locc.Recipe(), "verify": False, **options}
        return locc.compile(mlp(width), "dgl", splits(BLOCKS), **given)

    one, joined, least = program(), program(schedule="wave", backend="vmap"), arithmetic(width, batch)
    times = interleave(
        {
            "one by one": lambda: [one.step(*each) for each in data],
            "vmap": lambda: joined.wave(data),
            "least": lambda: [least() for _ in data],
        },
        rounds,
        clock=time.process_time,
    )
    apart = Timing.of(t / wave for t in times["one by one"])
    ratios = [ratio(times, name, "one by one") for name in ("vmap", "least")]
    shown = [f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for r in ratios]
    return f"| {width} | {apart} | {' | '.join(shown)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--wave", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    print("| width | a batch in lock-step | vmap / lock-step | arithmetic / lock-step |\n|---:|---|---|---|")
    for width in given.widths:
        print(measure(width, given.batch, given.wave, given.rounds), flush=True)


if __name__ == "__main__":
    main()
