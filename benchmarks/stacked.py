"""`python -m benchmarks.stacked`: modules as one (`backend="vmap"`, or `group=`) against one by one.

An MLP of twelve equal layers (`benchmarks.models.mlp`; `mlp-small` at width 512, batch 64) trains with `dgl`
and Adam on waves of batches: under `backend="vmap"`, and in lock-step, each on its own copy, in turn. Beside
them runs what neither can do without, on stacked tensors: the matrix products of a step, and one update of
all parameters. Times are of the processor, for a batch; a ratio is taken within each round. Of a wave under
"vmap" it tells which shares go into the operations of the steps, and into the optimizers.

With `--group 64MiB` the others are `backend="inductor"`, of each module and of groups of neighbours, all in
lock-step, and what a step of the groups allocates at the most.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch

import locc
from benchmarks.meter import Timing, allocated, interleave, ratio
from benchmarks.models import BLOCKS, CLASSES, mlp, splits
from locc.runtime.joined import Joined
from locc.runtime.stacked import Stack


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


def shares(wave: Callable[[], object]) -> list[str]:
    """Return which parts of five waves go into operations and into optimizers."""
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = time.process_time()
            try:
                return function(*given)
            finally:
                spent[name] += time.process_time() - began

        return run

    operations = patch.object(Stack, "run", timed("operations", Stack.run))
    optimizers = patch.object(Joined, "update", timed("optimizers", Joined.update))
    with operations, optimizers:
        for _ in range(5):
            timed("wave", wave)()
    return [f"{spent[name] / spent['wave']:.0%}" for name in ("operations", "optimizers")]


def measure(width: int, batch: int, wave: int, rounds: int, group: str | None) -> str:
    """Return a row of the table."""
    data = [(torch.randn(batch, width), torch.randint(CLASSES, (batch,))) for _ in range(wave)]

    def program(**options: Any) -> locc.Program:
        torch.manual_seed(0)
        x = data[0][0]
        given = {"example_inputs": x, "optimizer": locc.Recipe(), "verify": False, **options}
        return locc.compile(mlp(width), "dgl", splits(BLOCKS), **given)

    def steps(one: locc.Program) -> Callable[[], object]:
        return lambda: [one.step(*each) for each in data]

    entered: dict[str, Callable[[], object]] = {}
    if group is None:
        joined = program(schedule="wave", backend="vmap")
        entered["vmap"] = lambda: joined.wave(data)
    else:
        grouped = program(backend="inductor", group=group)
        entered |= {"inductor": steps(program(backend="inductor")), "groups": steps(grouped)}
    least = arithmetic(width, batch)
    entered |= {"arithmetic": lambda: [least() for _ in data], "one by one": steps(program())}
    times = interleave(entered, rounds, clock=time.process_time)
    apart = Timing.of(t / wave for t in times["one by one"])
    ratios = [ratio(times, name, "one by one") for name in entered if name != "one by one"]
    cells = [str(width), str(apart), *(f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for r in ratios)]
    if group is None:
        cells += shares(entered["vmap"])
    else:
        mib = allocated(lambda: grouped.step(*data[0])) / 2**20
        cells += [str(len(grouped.backend_report.groups)), f"{mib:.2f} MiB"]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--wave", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--group", help="a budget of memory: measure groups of neighbours, in lock-step")
    given = parser.parse_args(arguments)
    names = ["vmap"] if given.group is None else ["inductor", "groups"]
    titles = ["width", "a batch in lock-step", *(f"{name} / lock-step" for name in (*names, "arithmetic"))]
    titles += ["operations", "optimizers"] if given.group is None else ["groups", "peak of a step"]
    print(f"| {' | '.join(titles)} |\n|---:|{'---|' * (len(titles) - 1)}")
    for width in given.widths:
        print(measure(width, given.batch, given.wave, given.rounds, given.group), flush=True)


if __name__ == "__main__":
    main()
