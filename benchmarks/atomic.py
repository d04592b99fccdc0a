"""`python -m benchmarks.atomic`: what `compile(..., atomic=True)` costs in time and memory.

Two programs train copies of a twelve-block chain with `dgl` and Adam, cut into K modules, on one batch and in
turn; the ratio of their times is taken within each round. The memory is the peak of activations,
gradients and copies in a step, in units of the parameters.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial

import torch

import locc
from benchmarks.meter import gradients_of, interleave, peak, ratio
from benchmarks.models import WORKLOADS, splits


def measure(name: str, modules: int, rounds: int) -> str:
    """Return a row of the table for one workload."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model = workload.model()
    x, y = workload.batch()
    programs = {
        atomic: locc.compile(
            copy.deepcopy(model),
            "dgl",
            splits(modules),
            loss=workload.loss,
            example_inputs=x,
            head=lambda boundary, _: workload.head(boundary.shape[workload.feature_axis]),
            atomic=atomic,
            verify=False,
        )
        for atomic in (False, True)
    }
    steps = {str(atomic): partial(program.step, x, y) for atomic, program in programs.items()}
    times = interleave(steps, rounds)
    found = ratio(times, "True", "False")
    size = sum(p.numel() * p.element_size() for p in programs[False].root.parameters())
    peaks = {a: peak(steps[str(a)], gradients_of(p)).total / size for a, p in programs.items()}
    spread = f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"
    return f"| {name} | {modules} | {size / 1e6:.1f} MB | {spread} | {peaks[False]:.2f} | {peaks[True]:.2f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(arguments)
    print("| model | K | parameters | time, atomic / not | peak, not atomic | peak, atomic |")
    print("|---|---|---|---|---|---|")
    for name in ("mlp", "resnet", "gpt"):
        print(measure(name, 12, given.rounds), flush=True)


if __name__ == "__main__":
    main()
