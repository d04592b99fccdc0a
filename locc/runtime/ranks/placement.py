"""Which rank runs which modules: neighbours together, the slowest rank as fast as it can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from locc.lower import Instruction, Plan
from locc.runtime.executor import Executor

ROUNDS = 3
"""Steps that are timed; of each module the fastest counts."""


def measured(
    executor: Executor, plan: Plan, values: Sequence[Any], step: int, homes: Mapping[str, str]
) -> dict[str, float]:
    """Return the seconds of a step by module, auxiliaries with the one that they serve.

    It trains; the caller undoes that.

    Args:
        executor: of the program.
        plan: of all modules.
        values: of the plan's inputs.
        step: its number.
        homes: the module of each owner.
    """
    found = dict.fromkeys(homes.values(), float("inf"))
    for _ in range(ROUNDS):
        spent, look = _stopwatch(executor, homes)
        observe, executor.observe = executor.observe, look
        try:
            executor.run(plan, values, step)
        finally:
            executor.observe = observe
        for name in found:
            found[name] = min(found[name], spent.get(name, 0.0))
    return found


def _stopwatch(
    executor: Executor, homes: Mapping[str, str]
) -> tuple[dict[str, float], Callable[[Instruction, Any], None]]:
    spent: dict[str, float] = {}
    last = time.perf_counter()

    def look(instruction: Instruction, _: Any) -> None:
        nonlocal last
        if executor.device.type == "cuda":
            torch.cuda.synchronize(executor.device)
        now = time.perf_counter()
        home = homes[instruction.owner]
        spent[home] = spent.get(home, 0.0) + now - last
        last = now

    return spent, look


def shared_out(costs: Mapping[str, float], ranks: int) -> list[list[str]]:
    """Return the modules of each rank, in order and at least one each, so that the dearest is cheapest.

    Args:
        costs: of each module, in the order in which values pass; at least as many as ranks.
        ranks: their number.
    """
    names, each = list(costs), list(costs.values())

    @cache
    def best(start: int, parts: int) -> tuple[float, tuple[int, ...]]:
        """Return the dearest of `parts` ranks that share what is from `start` on, and where each ends."""
        if parts == 1:
            return sum(each[start:]), (len(each),)
        found = []
        for end in range(start + 1, len(each) - parts + 2):
            dearest, ends = best(end, parts - 1)
            found.append((max(sum(each[start:end]), dearest), (end, *ends)))
        return min(found)

    ends = best(0, ranks)[1]
    return [names[a:b] for a, b in zip((0, *ends[:-1]), ends, strict=True)]
