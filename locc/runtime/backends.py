"""How an instruction runs: one class a backend."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from locc.ir.captured import owned_tensor
from locc.ir.memory import memories
from locc.lower import Assign, Backward, Instruction, Plan, Segment, Update, instructions_of
from locc.runtime.compiled import careful
from locc.runtime.context import Context
from locc.runtime.graphs import Graphs, HostRandom, Kept, Start, Turn, recordable
from locc.runtime.learner import Learner
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
    gathers: ClassVar[bool] = False
    """Whether it runs programs of modules that receive first and send last (`lower.gathered`)."""

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
            self.context.offload.turn(instruction.owner, self.values)

    def ran(self, instruction: Instruction) -> None:
        """Tell the observer."""
        if self.context.observe is not None:
            self.context.observe(instruction, self.values)

    def stream(self, node: str) -> None:
        """Start the random stream of a node that draws."""
        seed_all(self.seed(node, self.round))

    def seed(self, node: str, repetition: int) -> int:
        """Return the seed of a node that draws."""
        replicas = self.context.replicas
        if replicas is not None and replicas.number:
            node = f"{node} of replica {replicas.number}"
        return stream(self.context.seed, self.number, node, repetition)

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
            # The error is raised when the flag is read.
            context.defer(self.number, task.objectives[0], learner.skipping(value))
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
        with careful(self.plan):
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


class CudaGraphs(Eager):
    """Runs an owner's stretch of a step as one recording, from the third step of its kind on.

    The first one runs eagerly. An optimizer has no state before it, so that the second is of another kind;
    the next one like it is recorded. What cannot be recorded runs eagerly, and the program's report says so.
    """

    gathers = True

    def __init__(self, context: Context, *given: Any) -> None:
        super().__init__(context, *given)
        self._start: Start | None = None
        self._watch: HostRandom | None = None
        self._streams: list[tuple[str, int]] = []
        self._flags: list[tuple[str, Tensor]] = []
        self._lent: set[int] = set()

    def run(self, instructions: list[Instruction]) -> None:
        """Run instructions in order, those of a plan turn by turn."""
        graphs = self.context.graphs
        if graphs is None or instructions is not self.plan.instructions or self.context.observe is not None:
            super().run(instructions)
            return
        for turn in graphs.turns(self.plan):
            if isinstance(turn, Turn):
                self._turn(turn, graphs, self.context.learners.get(turn.owner))
            else:
                super().run([turn])

    def _turn(self, turn: Turn, graphs: Graphs, learner: Learner | None) -> None:
        turn.reason = turn.reason or graphs.obstacle(turn, learner)
        if turn.reason is not None:
            graphs.tell(turn)
            super().run(turn.instructions)
            return
        kind = graphs.kind(turn, self.values, learner)
        if kind not in turn.met and kind not in turn.kept:
            self._meet(turn, kind, graphs)
        elif kind in turn.kept or self._record_turn(turn, kind, graphs, learner):
            self._replay(turn, turn.kept[kind], learner)

    def _meet(self, turn: Turn, kind: Hashable, graphs: Graphs) -> None:
        """Run a turn eagerly, and see what it draws from."""
        self._streams, self._watch = [], HostRandom(self.context.device)
        super().run(turn.instructions)
        self._watch.look()
        moved, self._watch = self._watch.moved, None
        if moved:
            turn.reason = "it draws random numbers on the CPU, which would be the same in every step"
            graphs.tell(turn)
        graphs.meet(turn, kind, tuple(self._streams))

    def _record_turn(self, turn: Turn, kind: Hashable, graphs: Graphs, learner: Learner | None) -> bool:
        """Record a turn, of which nothing happens yet; where that cannot be, run it eagerly."""
        inputs = {name: tree_map(_held, self.values[name]) for name in turn.reads}
        before = self.values, self.objectives, self.loss, self.moved
        self.values, self.objectives, self.loss, self.moved = dict(inputs), {}, None, []
        self._streams, self._flags = [], []
        failed: Exception | None = None

        def run(start: Start) -> None:
            self._start = start
            super(CudaGraphs, self).run(turn.instructions)

        try:
            with recordable(learner):
                recording = graphs.recorder.record(run, len(turn.met[kind]))
            kept = Kept(
                recording,
                _tensors(inputs.values()),
                tuple(self._streams),
                {name: tree_map(_detached, self.values[name]) for name in turn.leaves},
                self.objectives,
                self.loss,
                self._flags,
                self.moved,
            )
            graphs.keep(turn, kind, kept)
        except Exception as error:  # the batch's own, or of what cannot be recorded: running it tells
            failed = error
        finally:
            self._start = None
            self.values, self.objectives, self.loss, self.moved = before
            if learner is not None and turn.has(
                Backward
            ):  # another turn's gradients may wait for their update
                learner.clear()
            if self.surrounded:
                torch.clear_autocast_cache()
        if failed is None:
            return True
        super().run(turn.instructions)
        turn.reason = graphs.why(failed)
        graphs.tell(turn, failed)
        return False

    def _replay(self, turn: Turn, kept: Kept, learner: Learner | None) -> None:
        self.at = turn.instructions[0]
        written = [self.state(i.path) for i in instructions_of(turn.instructions) if isinstance(i, Assign)]
        if learner is not None:
            written += learner.parameters
        self.protect(Update(turn.owner, turn.frees), written)
        with torch.no_grad():
            values = _tensors([self.values[name] for name in turn.reads])
            for buffer, value in zip(kept.inputs, values, strict=True):
                buffer.copy_(value)
        kept.recording.replay([self.seed(node, repetition) for node, repetition in kept.streams])
        self.values.update(kept.outputs)
        self._lent |= memories(kept.outputs)
        # What the caller keeps must not be that of the next step.
        self.objectives |= {name: value.clone() for name, value in kept.objectives.items()}
        self.loss = self.loss if kept.loss is None else kept.loss.clone()
        self.moved += kept.moved
        for name, flag in kept.flags:
            self.context.defer(self.number, name, flag)
        for name in turn.frees:
            del self.values[name]

    def stream(self, node: str) -> None:
        """Start the random stream of a node that draws, in a recording by its number."""
        self._streams.append((node, self.round))
        if self._start is not None:
            self._start(len(self._streams) - 1)
            return
        if self._watch is not None:
            self._watch.look()
        super().stream(node)
        if self._watch is not None:
            self._watch.begin()

    def written(self) -> set[int]:
        """Return the memory that is written again, by instructions or by the next replay."""
        return super().written() | self._lent

    def _record(self, task: Backward, value: Tensor) -> None:
        if self._start is None:
            super()._record(task, value)
            return
        self.objectives |= dict.fromkeys(task.objectives, value)
        if self.context.guarded:
            learner = self.context.learners.get(task.owner)
            flag = (~torch.isfinite(value)).float() if learner is None else learner.skipping(value)
            self._flags.append((task.objectives[0], flag))


class Vmap(Eager):
    """Runs what runs by itself in a wave along its diagonal (`stacked.Diagonal`)."""


BACKENDS: dict[str, type[Eager]] = {
    "eager": Eager,
    "inductor": Inductor,
    "aot_eager": AotEager,
    "cudagraphs": CudaGraphs,
    "vmap": Vmap,
}
"""The backends by name, as `compile` takes it."""


def _held(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in tree_leaves(list(values)) if isinstance(v, Tensor)]
