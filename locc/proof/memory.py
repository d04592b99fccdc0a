"""An estimate of what a step needs in memory, from a step on shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
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


def estimate(
    ir: TrainingGraph,
    optimizers: Mapping[str, optim.Optimizer],
    batch: Batch,
    plans: list[Plan] | None = None,
) -> tuple[Memory, int]:
    """Run one step on shapes, freeing what the runtime frees, and count what is alive.

    Returns:
        The estimate, and the floating-point operations of the step (a repeated region counts `ROUNDS` times).

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
        state = sum(_bytes(held) for optimizer in optimizers.values() for held in optimizer.state.values())
    at = max(owners, key=lambda owner: owners[owner], default="")
    return Memory(batch.size, parameters, state, owners.get(at, 0), at, tuple(owners.items())), operations


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
