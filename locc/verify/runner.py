"""Runs the instructions of a plan for a check; what an instruction means is up to the check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim

from locc.ir import TrainingGraph
from locc.lower import Backward, Instruction, Loop, Plan, Segment, Update, lower
from locc.verify.worlds import Real

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


class Trainer(Runner):
    """Runs a step in full, backward passes and optimizer steps included; frees values as the runtime does."""

    def __init__(
        self, ir: TrainingGraph, plan: Plan, optimizers: Mapping[str, optim.Optimizer], world: Real
    ) -> None:
        super().__init__(ir, plan)
        self.optimizers, self.world = optimizers, world
        self.parameters = {owner: list(ir.parameters(owner).values()) for owner in ir.owners}

    def instructions(self, instructions: list[Instruction]) -> None:
        """Run instructions in order, and let values go where the runtime does."""
        for instruction in instructions:
            super().instructions([instruction])
            for name in instruction.frees:
                del self.values[name]

    def segment(self, segment: Segment) -> None:
        """Run straight-line code of one owner."""
        with self.world.mode:
            super().segment(segment)

    def backward(self, task: Backward) -> None:
        """Back-propagate one scalar; parameters receive what an objective gives them."""
        scalar: Tensor = self.values[task.scalar]
        leaves = [self.values[leaf] for _, leaf in task.gradients]
        found: list[Tensor | None] = [None] * len(leaves)
        with self.world.mode:
            if scalar.requires_grad and task.objectives:
                scalar.backward(retain_graph=task.retain)
                found = [leaf.grad for leaf in leaves]
                for leaf in leaves:
                    leaf.grad = None
            elif scalar.requires_grad:
                found = list(torch.autograd.grad(scalar, leaves, retain_graph=task.retain, allow_unused=True))
        self.gradients_of(task, found)

    def update(self, task: Update) -> None:
        """Run one optimizer step of an owner, and drop its gradients."""
        # Outside the world's mode: an optimizer's counters are real numbers even where tensors are shapes.
        optimizer = self.optimizers.get(task.owner)
        if optimizer is not None:
            optimizer.step()
        self.drop_gradients(task.owner)

    def drop_gradients(self, owner: str) -> None:
        """Let go of an owner's gradients after its update."""
        for parameter in self.parameters[owner]:
            parameter.grad = None

    def loop(self, loop: Loop) -> None:
        """Run a repeated region, at most `ROUNDS` times."""
        super().loop(loop)
        for _, entry, _ in loop.carried:
            del self.values[entry]
