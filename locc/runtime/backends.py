"""How an instruction runs: one class a backend."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from locc.ir.captured import owned_tensor
from locc.ir.memory import memories
from locc.lower import Assign, Backward, Instruction, Plan, Segment, Update
from locc.runtime.compiled import careful
from locc.runtime.context import Context
from locc.runtime.machine import Channels, Machine
from locc.runtime.stops import account, non_finite
from locc.runtime.streams import autocast, of_backward, of_update, seed_all, stream


class Eager(Machine):
    """Runs a step on PyTorch's eager operators, with the program's optimizers, precision and random streams.

    Attributes:
        objectives: the local objectives by name.
        loss: the user's loss, where the plan computes it.
        moved: the owners whose parameters or state this step has set.
        surrounded: whether the step runs inside of the user's own autocast.
    """

    apart: ClassVar[bool] = False
    """Whether it runs plans that are lowered for a compiler (`lower(apart=True)`)."""

    def __init__(
        self,
        context: Context,
        plan: Plan,
        values: Iterable[Any],
        step: int,
        channels: Channels | None = None,
    ) -> None:
        super().__init__(plan, values, channels)
        self.context, self.number = context, step
        self.objectives: dict[str, Tensor] = {}
        self.loss: Tensor | None = None
        self.moved: list[str] = []
        self.surrounded = torch.is_autocast_enabled(context.device.type)

    def begins(self, instruction: Instruction) -> None:
        """Let the owners take turns in memory."""
        if self.context.offload is not None:
            self.context.offload.turn(instruction.owner)

    def ran(self, instruction: Instruction) -> None:
        """Tell the observer."""
        if self.context.observe is not None:
            self.context.observe(instruction, self.values)

    def stream(self, node: str) -> None:
        """Start the random stream of a node that draws."""
        replicas = self.context.replicas
        if replicas is not None and replicas.number:
            node = f"{node} of replica {replicas.number}"
        seed_all(stream(self.context.seed, self.number, node, self.round))

    def segment(self, segment: Segment) -> None:
        """Run straight-line code of one owner."""
        if self.context.autocast is not None:
            with autocast(self.context.device, self.context.autocast):
                super().segment(segment)
        else:
            if self.surrounded:
                # The user's own autocast keeps cast weights, made without a tape or before an update.
                torch.clear_autocast_cache()
            super().segment(segment)
        if self.plan.loss in segment.writes:
            self.loss = self._whole(self.values[self.plan.loss].detach())

    def differentiate(self, task: Backward, values: list[Tensor]) -> list[Tensor | None]:
        """Back-propagate, unless the objective is not finite."""
        if task.objectives:
            self._record(task, self._whole(self.values[task.scalar].detach()))
        self.stream(of_backward(task.scalar))  # hooks and custom functions may draw
        learner = self.context.learners.get(task.owner)
        if not (self.context.in_backward and task.objectives and learner is not None):
            return super().differentiate(task, values)
        self.protect(task, learner.parameters)
        self.moved.append(task.owner)
        with learner.updating():
            return super().differentiate(task, values)

    def _whole(self, value: Tensor) -> Tensor:
        """Return the mean of a scalar over the shares of the batch."""
        if self.context.replicas is None:
            return value
        value = value.clone()
        self.context.replicas.mean([value])
        return value

    def _record(self, task: Backward, value: Tensor) -> None:
        for name in task.objectives:
            self.objectives[name] = value
        context = self.context
        if not context.guarded:
            return
        learner = context.learners.get(task.owner)
        if value.device.type != "cpu" and learner is not None and learner.gated and not context.atomic:
            # The optimizer skips its update on the device; the error is raised when the flag is read.
            flag = (~torch.isfinite(value)).float()
            learner.skip = flag if learner.skip is None else torch.maximum(learner.skip, flag)
            learner.optimizer.found_inf = learner.skip  # type: ignore[attr-defined]
            learner.optimizer.grad_scale = None  # type: ignore[attr-defined]
            context.defer(self.number, task.objectives[0], flag)
        elif not math.isfinite(value):
            raise non_finite(task.objectives[0], float(value), self.account())

    def update(self, task: Update) -> None:
        """Run one optimizer step of an owner, on a random stream of its own."""
        learner = self.context.learners[task.owner]
        self.protect(task, learner.parameters)
        if self.context.replicas is not None:
            self.context.replicas.mean([p.grad for p in learner.parameters if p.grad is not None])
        if learner.draws:
            self.stream(of_update(task.owner))
        if learner.update(self.context.accumulate):
            self.moved.append(task.owner)

    def assign(self, task: Assign) -> None:
        """Set a parameter or state."""
        super().assign(task)
        self.moved.append(task.owner)

    def account(self) -> str:
        """Return what this step has updated so far, as a sentence."""
        return account(self.moved, self.context.atomic)

    def state(self, path: str) -> Tensor:
        """Return the parameter or state at a path of the root."""
        held = owned_tensor(self.context.root, path)
        assert isinstance(held, Tensor)
        return held

    def written(self) -> set[int]:
        """Return the memory of everything under the root."""
        held = (t for m in self.context.modules for t in (*m._parameters.values(), *m._buffers.values()))
        return memories([t for t in held if t is not None])


class Inductor(Eager):
    """Runs an owner's straight-line code as `torch.compile` compiles it, and its backward pass with it.

    A segment is compiled when it first runs, one for all of the same structure, and again for what differs
    since: the first batch of another size for every size. What cannot be compiled runs eagerly, and the
    program's report says so.
    """

    apart = True
    compiler: ClassVar[str] = "inductor"

    def run(self, instructions: list[Instruction]) -> None:
        """Run instructions in order."""
        with careful():
            super().run(instructions)

    def compute(self, segment: Segment, values: list[Any]) -> tuple[Any, ...]:
        """Return what the compiled code of a segment makes of the values that it reads."""

        def eagerly() -> tuple[Any, ...]:
            return super(Inductor, self).compute(segment, values)

        if not segment.computes:
            return eagerly()
        if segment.draws is not None:
            self.stream(segment.draws)
        return self.context.codes.run(segment, self.compiler, values, eagerly)


class AotEager(Inductor):
    """Compiles as `Inductor`, and runs the result on eager operators: the bits are those of `Eager`."""

    compiler = "aot_eager"


class Vmap(Eager):
    """Runs what runs by itself in a wave along its diagonal (`stacked.Diagonal`)."""


BACKENDS: dict[str, type[Eager]] = {
    "eager": Eager,
    "inductor": Inductor,
    "aot_eager": AotEager,
    "vmap": Vmap,
}
"""The backends by name, as `compile` takes it."""
