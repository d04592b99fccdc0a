"""Runs a plan for a check; what an instruction means is up to the check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, optim

from locc.errors import GraphError
from locc.ir import TrainingGraph
from locc.ir.captured import owned_tensor
from locc.lower import Backward, Loop, Plan, Segment, Update, lower
from locc.optimizers import take_step
from locc.proof.experiment.worlds import Real
from locc.runtime import Machine

ROUNDS = 2
"""A repeated region runs this often in a check: once fresh, once on what it carries."""


def plans_of(ir: TrainingGraph) -> list[Plan]:
    """Return the plans that a check must run: the step in which all train, or one for each phase.

    A method whose phases cannot run in one step has no plan in which all train.
    """
    try:
        return [lower(ir)]
    except GraphError:
        if not ir.phases:
            raise
    return [lower(ir, frozenset(phase.trains)) for phase in ir.phases]


class Runner(Machine):
    """Runs steps of a plan, one after the other, in a world of its own."""

    def __init__(self, ir: TrainingGraph, plan: Plan, world: Real) -> None:
        super().__init__(plan, [None] * len(plan.inputs))
        self.ir, self.world, self.step = ir, world, 0
        self.maker = {n.name: str(n.meta.get("owner")) for n in ir.graph.nodes}

    def step_on(self, inputs: list[Any]) -> None:
        """Run one step on the tensors of a batch and the target."""
        self.values = self.plan.bind(inputs)
        self.run(self.plan.instructions)
        self.values = {}
        self.step += 1

    def state(self, path: str) -> Tensor:
        """Return the parameter or state at a path of the root."""
        held = owned_tensor(self.ir.root, path)
        assert isinstance(held, Tensor)
        return held

    def rounds(self, loop: Loop) -> int:
        """Return how often a repeated region runs: at most `ROUNDS` times."""
        return min(loop.times, ROUNDS)

    def update(self, task: Update) -> None:
        """Run one optimizer step of an owner."""


class Trainer(Runner):
    """Runs a step in full, optimizer steps included."""

    def __init__(
        self, ir: TrainingGraph, plan: Plan, optimizers: Mapping[str, optim.Optimizer], world: Real
    ) -> None:
        super().__init__(ir, plan, world)
        self.optimizers = optimizers
        self.parameters = {owner: list(ir.parameters(owner).values()) for owner in ir.owners}

    def segment(self, segment: Segment) -> None:
        """Run straight-line code of one owner."""
        with self.world.mode:
            super().segment(segment)

    def differentiate(self, task: Backward, values: list[Tensor]) -> list[Tensor | None]:
        """Back-propagate one scalar; parameters receive what an objective gives them."""
        with self.world.mode:
            return super().differentiate(task, values)

    def update(self, task: Update) -> None:
        """Run one optimizer step of an owner, and drop its gradients."""
        # Outside the world's mode: an optimizer's counters are real numbers even where tensors are shapes.
        optimizer = self.optimizers.get(task.owner)
        self.protect(task, self.parameters[task.owner])
        if optimizer is not None:
            take_step(optimizer)
        self.drop_gradients(task.owner)

    def drop_gradients(self, owner: str) -> None:
        """Let go of an owner's gradients after its update."""
        for parameter in self.parameters[owner]:
            parameter.grad = None
