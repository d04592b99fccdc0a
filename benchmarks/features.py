"""`python -m benchmarks.features`: what `compile(..., features="memory")` spares a sequential training.

Two programs train copies of a chain of eight equal blocks with `dgl` and Adam, module after module, some
epochs a stage, in turn. The first pass of a stage computes the features and keeps them; the later ones read
them, and are what is meant by an epoch of a stage here. All ratios are of times within a round.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import locc
from benchmarks.meter import Timing
from benchmarks.models import CLASSES, Chain, MLPBlock, ResidualBlock, linear_head, pooled_head

BLOCKS, BATCHES = 8, 4


def chain(name: str) -> tuple[Chain, torch.Tensor]:
    """Return a network and the inputs of an epoch."""
    if name == "mlp":
        model = Chain(nn.Identity(), [MLPBlock(512) for _ in range(BLOCKS)], linear_head(512))
        return model, torch.randn(BATCHES, 256, 512)
    stem = nn.Conv2d(3, 32, 3, padding=1)
    model = Chain(stem, [ResidualBlock(32) for _ in range(BLOCKS)], pooled_head(32))
    return model, torch.randn(BATCHES, 32, 3, 16, 16)


def times(name: str, modules: int, features: str | None, epochs: int) -> list[list[float]]:
    """Train a fresh program; return the seconds of each pass, stage by stage."""
    torch.manual_seed(0)
    model, inputs = chain(name)
    data = [(x, torch.randint(0, CLASSES, (len(x),))) for x in inputs]
    head = linear_head if name == "mlp" else pooled_head
    program = locc.compile(
        model,
        "dgl",
        [f"blocks.{BLOCKS * k // modules - 1}" for k in range(1, modules)],
        example_inputs=inputs[0],
        head=lambda boundary, _: head(boundary.shape[1]),
        schedule="sequential",
        features=features,
        verify=False,
    )
    passes = [epoch.seconds for epoch in program.fit(data, epochs, progress=False).epochs]
    return [passes[k : k + epochs] for k in range(0, len(passes), epochs)]


def measure(name: str, modules: int, epochs: int, rounds: int) -> str:
    """Return a row of the table."""
    ratios: list[tuple[float, ...]] = []
    for _ in range(rounds):
        plain, kept = (times(name, modules, place, epochs) for place in (None, "memory"))
        first, late, spared = (sum(s[1:]) for s in (plain[0], plain[-1], kept[-1]))
        whole = sum(map(sum, kept)) / sum(map(sum, plain))
        ratios.append((whole, spared / late, late / first, spared / first))
    cells = (
        f"{t.median:.2f} ({t.low:.2f} to {t.high:.2f})" for t in map(Timing.of, zip(*ratios, strict=True))
    )
    return f"| {name} | {modules} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5, help="of each stage, at least 2")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    print("| model | K | fit, kept / not | epoch of stage K, kept / not | stage K / 1, not kept | kept |")
    print("|---|---|---|---|---|---|")
    for name in ("mlp", "resnet"):
        for modules in (4, 8):
            print(measure(name, modules, given.epochs, given.rounds), flush=True)


if __name__ == "__main__":
    main()
