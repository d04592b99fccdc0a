"""`python -m benchmarks.stacked`: modules of one structure as one (`backend="vmap"`) against one by one.

A chain of equal layers trains with `dgl` and Adam on waves of batches: under `backend="vmap"`, and in
lock-step, each on its own copy, in turn. Times are of a batch; a ratio is taken within each round.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import locc
from benchmarks.meter import Timing, interleave, ratio
from benchmarks.models import CLASSES


def chain(width: int, modules: int) -> nn.Sequential:
    """Return a network of `modules` modules."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(modules - 1)]
    return nn.Sequential(*blocks, nn.Linear(width, CLASSES))


def measure(width: int, modules: int, batch: int, wave: int, rounds: int) -> str:
    """Return a row of the table."""
    data = [(torch.randn(batch, width), torch.randint(CLASSES, (batch,))) for _ in range(wave)]

    def program(**options: Any) -> locc.Program:
        splits = [str(k) for k in range(modules - 1)]
        model = chain(width, modules)
        return locc.compile(
            model, "dgl", splits, example_inputs=data[0][0], optimizer=locc.Recipe(), verify=False, **options
        )

    one, joined = program(), program(schedule="wave", backend="vmap")
    times = interleave(
        {"one by one": lambda: [one.step(*each) for each in data], "vmap": lambda: joined.wave(data)}, rounds
    )
    apart = Timing.of(t / wave for t in times["one by one"])
    found = ratio(times, "vmap", "one by one")
    return f"| {width} | {apart} | {found.median:.2f} ({found.low:.2f} to {found.high:.2f}) |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--modules", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--wave", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    print("| width | a batch in lock-step | vmap / lock-step |\n|---:|---|---|")
    for width in given.widths:
        print(measure(width, given.modules, given.batch, given.wave, given.rounds), flush=True)


if __name__ == "__main__":
    main()
