"""An estimate of what a step needs in memory, from a step on shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, optim
from torch.utils._pytree import tree_leaves, tree_map

from locc.facts import Memory
from locc.ir import TrainingGraph
from locc.ir.state import begin
from locc.lower import Instruction, Plan, Update
from locc.proof.experiment.batch import Batch, standing_in
from locc.proof.experiment.dispatch import Meter, memory_of
from locc.proof.experiment.runner import Trainer, plans_of
from locc.proof.experiment.worlds import Meta
from locc.snapshot import preserved


@dataclass(frozen=True)
class Estimate:
    """What a step needs.

    Attributes:
        memory: in bytes.
        operations: of floating-point numbers (a repeated region counts `ROUNDS` times).
        states: bytes of each owner's optimizer.
    """

    memory: Memory
    operations: int
    states: dict[str, int]


def estimate(
    ir: TrainingGraph,
    optimizers: Mapping[str, optim.Optimizer],
    batch: Batch,
    plans: list[Plan] | None = None,
) -> Estimate:
    """Run one step on shapes, freeing what the runtime frees, and count what is alive.

    Raises:
        Exception: whatever a model raises that does not run on shapes alone.
    """
    parameters = sum(t.untyped_storage().nbytes() for t in _held(ir))
    owners: dict[str, int] = {}
    operations = 0
    with preserved(ir.root, optimizers.values(), values=False), standing_in(ir, batch.stand_in):
        world = Meta()
        inputs = tree_map(world.of, [*batch.tensors, batch.target])
        begin(ir.root, batch.size)
        world.enter(ir, optimizers.values())
        for plan in plans or plans_of(ir):
            known = [*_held(ir), *[t for t in tree_leaves(inputs) if isinstance(t, Tensor)]]
            meter = Meter(known, world.kernel)
            scale = _Scale(ir, plan, optimizers, world, meter, owners)
            try:
                with meter:
                    scale.step_on(inputs)
            finally:
                meter.forget()
            operations = max(operations, meter.operations)
        states = {owner: sum(map(_bytes, held.state.values())) for owner, held in optimizers.items()}
    at = max(owners, key=lambda owner: owners[owner], default="")
    total = sum(states.values())
    memory = Memory(batch.size, parameters, total, owners.get(at, 0), at, tuple(owners.items()))
    return Estimate(memory, operations, states)


def _held(ir: TrainingGraph) -> list[Tensor]:
    """Return the program's parameters and buffers, one for each storage."""
    tensors = [*ir.root.parameters(), *ir.root.buffers()]
    return list({memory_of(t): t for t in tensors if memory_of(t) is not None}.values())


def _bytes(held: dict[str, Any]) -> int:
    return sum(t.nbytes for t in held.values() if isinstance(t, Tensor))


class _Scale(Trainer):
    """Weighs each instruction; an optimizer's temporaries and its state are weighed apart."""

    def __init__(
        self,
        ir: TrainingGraph,
        plan: Plan,
        optimizers: Mapping[str, optim.Optimizer],
        world: Meta,
        meter: Meter,
        owners: dict[str, int],
    ) -> None:
        super().__init__(ir, plan, optimizers, world)
        self.meter, self.owners = meter, owners

    def ran(self, instruction: Instruction) -> None:
        most = max(self.owners.get(instruction.owner, 0), self.meter.peak)
        self.owners[instruction.owner] = most
        self.meter.peak = self.meter.live

    def update(self, task: Update) -> None:
        self.meter.paused = True
        super().update(task)
        self.meter.paused = False
