"""`python -m benchmarks.profile`: where the time of a step goes.

Timers around the parts of `program.step` count what each takes beyond the parts inside of it, so that they
add up to the step. Steps with and without timers take turns: their ratio says what the timers cost.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

import torch

import locc
from benchmarks.contestants import local
from benchmarks.meter import Timing
from benchmarks.models import WORKLOADS
from locc.losses import Loss
from locc.lower import Plan
from locc.runtime.backends import Eager
from locc.runtime.learner import Learner
from locc.runtime.machine import Machine


class Stopwatch:
    """Counts the seconds of parts, each without the parts that run inside of it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inside: list[float] = []

    def timed(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return `run` as a part."""

        @wraps(run)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = self.clock()
            try:
                return run(*args, **kwargs)
            finally:
                took = self.clock() - began
                self.seconds[part] += took - self._inside.pop()
                self.calls[part] += 1
                if self._inside:
                    self._inside[-1] += took

        return measured


class Values(dict[str, Any]):
    """What is in flight in a step, which is freed when it is deleted."""


@contextmanager
def watched(watch: Stopwatch, program: locc.Program) -> Iterator[None]:
    """Time the parts of the steps inside."""
    heads = [module for roles in program.auxiliaries.values() for module in roles.values()]
    parts: list[tuple[Any, str, str]] = [
        (Loss, "__call__", "objective"),
        *((head, "forward", "head") for head in heads),
        (torch.Tensor, "backward", "backward"),
        *((learner.optimizer, "step", "optimizer") for learner in program.built.learners.values()),
        (Learner, "clear", "gradients freed"),
        (Values, "__delitem__", "values freed"),
        (Machine, "run", "interpretation of the plan"),
        (Eager, "segment", "interpretation of the plan"),
        (Eager, "backward", "interpretation of the plan"),
        (Eager, "update", "interpretation of the plan"),
        (Machine, "protect", "copies of what is overwritten"),
        (Eager, "stream", "random streams"),
        (torch, "get_rng_state", "random streams"),
        (torch, "set_rng_state", "random streams"),
        (Eager, "_record", "guard: is the objective finite"),
    ]
    with ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        for segment in program.plan().instructions:
            if hasattr(segment, "function"):
                code = watch.timed("forward", segment.function)
                stack.enter_context(patch.object(segment, "function", code))
        bind = Plan.bind
        stack.enter_context(patch.object(Plan, "bind", lambda *given: Values(bind(*given))))
        yield


def report(name: str, modules: int, steps: int, rounds: int, clock: Callable[[], float]) -> Iterator[str]:
    """Yield the lines of a table: milliseconds of a step, share of it, calls."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    model, (x, y) = workload.model(), workload.batch()
    program = local(workload, model, x, modules)
    for _ in range(3):
        program.step(x, y)
    watch, plain, timed = Stopwatch(clock), [], []
    step = watch.timed("the rest of program.step", program.step)

    def seconds(run: Callable[..., Any]) -> float:
        began = clock()
        for _ in range(steps // rounds):
            run(x, y)
        return clock() - began

    for _ in range(rounds):
        plain.append(seconds(program.step))
        with watched(watch, program):
            timed.append(seconds(step))
    total, count = sum(watch.seconds.values()), steps // rounds * rounds
    yield f"| {name}, K = {modules} | ms a step | share | calls a step |"
    yield "|---|---:|---:|---:|"
    for part, spent in watch.seconds.most_common():
        calls = watch.calls[part] / count
        yield f"| {part} | {spent / count * 1e3:.2f} | {spent / total:.2%} | {calls:.0f} |"
    yield f"| a step | {total / count * 1e3:.2f} | | |"
    cost = Timing.of(t / p for t, p in zip(timed, plain, strict=True))
    yield f"\nWith timers / without: {cost.median:.3f} ({cost.low:.3f} to {cost.high:.3f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("models", nargs="*", default=["gpt"], choices=list(WORKLOADS))
    parser.add_argument("-k", "--modules", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processor", action="store_true", help="time the processor and not the clock")
    given = parser.parse_args(argv)
    clock = process_time if given.processor else perf_counter
    for name in given.models:
        for line in report(name, given.modules, given.steps, given.rounds, clock):
            print(line, flush=True)


if __name__ == "__main__":
    main()
