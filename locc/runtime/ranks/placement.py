"""Which rank runs which modules: neighbours together, the slowest rank as fast as it can be."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from locc.lower import Instruction, ModuleProgram, Plan
from locc.runtime.executor import Executor

ROUNDS = 3
"""Steps that are timed; of each module the fastest counts."""


@dataclass
class Cost:
    """What a module takes in a step.

    Attributes:
        seconds: of its step.
        first: seconds until all that it sends is computed.
        sends: bytes of each value that it sends, and the modules that read it.
    """

    seconds: float = 0.0
    first: float = 0.0
    sends: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)


def measured(
    executor: Executor, plan: Plan, programs: Sequence[ModuleProgram], values: Sequence[Any], step: int
) -> dict[str, Cost]:
    """Return what each module takes, with the auxiliaries that serve it.

    It trains; the caller undoes that.

    Args:
        executor: of the program.
        plan: of all modules.
        programs: what `plan` is cut into.
        values: of the plan's inputs.
        step: its number.
    """
    found: dict[str, Cost] = {}
    for _ in range(ROUNDS):
        watch = _Watch(executor.device, programs)
        observe, executor.observe = executor.observe, watch
        try:
            executor.run(plan, values, step)
        finally:
            executor.observe = observe
        for name, cost in watch.costs.items():
            found[name] = min(found.get(name, cost), cost, key=lambda c: c.seconds)
    return found


class _Watch:
    """Called after each instruction of a step."""

    def __init__(self, device: torch.device, programs: Sequence[ModuleProgram]) -> None:
        self.device = device
        self.homes = {owner: part.name for part in programs for owner in part.owners}
        self.costs = {part.name: Cost() for part in programs}
        self.readers = {
            sent.name: tuple(dict.fromkeys(self.homes[owner] for owner in sent.to))
            for part in programs
            for sent in part.sends
        }
        self.last = time.perf_counter()

    def __call__(self, instruction: Instruction, values: Mapping[str, Any]) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        cost = self.costs[self.homes[instruction.owner]]
        cost.seconds += now - self.last
        for name in instruction.writes:
            if name in self.readers and name in values:
                tensors = [leaf for leaf in tree_leaves(values[name]) if isinstance(leaf, Tensor)]
                cost.sends[name] = sum(t.numel() * t.element_size() for t in tensors), self.readers[name]
                cost.first = cost.seconds
        self.last = time.perf_counter()


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
