"""Runs the instructions of a plan for a check; what an instruction means is up to the check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from locc.ir import TrainingGraph
from locc.lower import Backward, Instruction, Loop, Plan, Segment, Update, lower

ROUNDS = 2
"""A repeated region runs this often in a check: once fresh, once on what it carries."""


def plans_of(ir: TrainingGraph) -> list[Plan]:
    """Return the plans that a check must run: the step in which all train, or one for each phase.

    A method whose phases cannot run in one step has no plan in which all train.
    """
    from locc.errors import GraphError

    try:
        return [lower(ir)]
    except GraphError:
        if not ir.phases:
            raise
    return [lower(ir, frozenset(phase.trains)) for phase in ir.phases]


class Runner:
    """Runs one step of a plan; keeps every value until the step is over."""

    def __init__(self, ir: TrainingGraph, plan: Plan) -> None:
        self.ir, self.plan = ir, plan
        self.values: dict[str, Any] = {}
        self.step = 0
        self.maker = {n.name: str(n.meta.get("owner")) for n in ir.graph.nodes}

    def run(self, inputs: list[Any]) -> None:
        """Run one step on the tensors of a batch and the target."""
        self.values = dict(zip(self.plan.inputs, inputs, strict=True))
        self.instructions(self.plan.instructions)
        self.values = {}
        self.step += 1

    def instructions(self, instructions: list[Instruction]) -> None:
        """Run instructions in order."""
        for instruction in instructions:
            if isinstance(instruction, Segment):
                self.segment(instruction)
            elif isinstance(instruction, Backward):
                self.backward(instruction)
            elif isinstance(instruction, Update):
                self.update(instruction)
            else:
                self.loop(instruction)

    def segment(self, segment: Segment) -> None:
        """Run straight-line code of one owner."""
        with torch.set_grad_enabled(segment.taped):
            results = segment.function(*[self.values[name] for name in segment.reads])
        self.values.update(zip(segment.writes, results, strict=True))

    def backward(self, task: Backward) -> None:
        """Back-propagate one scalar."""
        raise NotImplementedError

    def update(self, task: Update) -> None:
        """Run one optimizer step of an owner."""

    def loop(self, loop: Loop) -> None:
        """Run a repeated region, at most `ROUNDS` times."""
        for i in range(min(loop.times, ROUNDS)):
            for initial, entry, end in loop.carried:
                self.values[entry] = self.values[initial] if i == 0 else self.values[end]
            self.instructions(loop.body)

    def gradients_of(self, task: Backward, found: list[Tensor | None]) -> None:
        """Store the gradients of a backward pass; a leaf that was not reached has gradient zero."""
        for (name, leaf), gradient in zip(task.gradients, found, strict=True):
            value = self.values[leaf]
            self.values[name] = torch.zeros_like(value) if gradient is None else gradient.detach()
