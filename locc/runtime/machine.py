"""What runs instructions, one after the other: the ground of every backend, check and experiment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from locc.errors import LoccError
from locc.ir import ops
from locc.ir.memory import memories, memory_of
from locc.lower import (
    Assign,
    Backward,
    Instruction,
    Loop,
    Plan,
    Receive,
    Segment,
    Send,
    Update,
    tracked,
    unknown,
)


class Channels(Protocol):
    """Carries values between the programs of a step."""

    def send(self, instruction: Send, value: Any) -> None:
        """Hand on a value; returns at once."""

    def receive(self, instruction: Receive) -> Any:
        """Wait for a value."""


@dataclass
class Held:
    """Channels between programs that run one after the other in this process; what is sent stays."""

    values: dict[str, Any] = field(default_factory=dict)

    def send(self, instruction: Send, value: Any) -> None:
        """Keep a value."""
        self.values[instruction.value] = value

    def receive(self, instruction: Receive) -> Any:
        """Return a value that is kept."""
        return self.values[instruction.value]


class Machine:
    """Runs one step of a plan on PyTorch's eager operators.

    A backend, or a check, is a subclass that says how a kind of instruction runs. It must leave the values
    that the instruction writes in `values`; what is no longer read is dropped here.

    Attributes:
        plan: what runs.
        values: what is in flight, by name.
        round: number of the round, inside of a repeated region.
        at: the instruction that runs, or ran last.
    """

    drops: ClassVar[bool] = True
    """Whether values go when nothing reads them any more."""

    _HOW: ClassVar[dict[type, str]] = {
        Segment: "segment",
        Backward: "backward",
        Update: "update",
        Assign: "assign",
        Loop: "loop",
        Send: "send",
        Receive: "receive",
    }

    def __init__(self, plan: Plan, values: Iterable[Any] = (), channels: Channels | None = None) -> None:
        self.plan, self.channels, self.round = plan, channels, 0
        self.at: Instruction | None = None
        self.values: dict[str, Any] = plan.bind(values)

    def run(self, instructions: list[Instruction]) -> None:
        """Run instructions in order.

        Raises:
            LoccError: an instruction of an unknown kind.
        """
        for instruction in instructions:
            self.at = instruction
            how = self._HOW.get(type(instruction))
            if how is None:
                raise unknown(instruction)
            self.begins(instruction)
            getattr(self, how)(instruction)
            self.ran(instruction)
            if self.drops:
                for name in instruction.frees:
                    del self.values[name]

    def begins(self, instruction: Instruction) -> None:
        """Make ready what an instruction touches."""

    def ran(self, instruction: Instruction) -> None:
        """Look at what an instruction left, before what is no longer read is dropped."""

    def stream(self, node: str) -> None:
        """Start the random stream of a node that draws."""

    # ---- the kinds of instructions ------------------------------------------------------------

    def segment(self, segment: Segment) -> None:
        """Run straight-line code of one owner."""
        with torch.set_grad_enabled(segment.taped):
            results = self.compute(segment, [self.values[name] for name in segment.reads])
            self.values.update(zip(segment.writes, results, strict=True))
            for name in segment.leaves:
                self.values[name] = tracked(self.values[name])

    def compute(self, segment: Segment, values: list[Any]) -> tuple[Any, ...]:
        """Return what the code of a segment makes of the values that it reads."""
        return segment.function(self.stream, *values)

    def backward(self, task: Backward) -> None:
        """Back-propagate one scalar; parameters receive what an objective gives them."""
        values = [self.values[name] for _, name in task.gradients]
        for (name, _), value, found in zip(
            task.gradients, values, self.differentiate(task, values), strict=True
        ):
            self.values[name] = torch.zeros_like(value) if found is None else found.detach()

    def differentiate(self, task: Backward, values: list[Tensor]) -> list[Tensor | None]:
        """Return the gradients of a task's scalar with respect to `values`."""
        scalar: Tensor = self.values[task.scalar]
        if not scalar.requires_grad:
            return [None] * len(values)
        if not task.objectives:
            return list(torch.autograd.grad(scalar, values, retain_graph=task.retain, allow_unused=True))
        for value in values:
            value.grad = None  # what another objective has left in a leaf
            if not value.is_leaf:
                value.retain_grad()
        scalar.backward(retain_graph=task.retain)
        found = [value.grad for value in values]
        for value in values:
            value.grad = None
        return found

    def update(self, task: Update) -> None:
        """Run one optimizer step of an owner."""
        raise NotImplementedError

    def assign(self, task: Assign) -> None:
        """Set a parameter or state."""
        target, value = self.state(task.path), self.values[task.value]
        self.protect(task, [target])
        with torch.no_grad():
            target.copy_(value.clone() if memory_of(value) == memory_of(target) else value)

    def state(self, path: str) -> Tensor:
        """Return the parameter or state at a path of the root."""
        raise NotImplementedError

    def loop(self, loop: Loop) -> None:
        """Run a repeated region."""
        for i in range(self.rounds(loop)):
            self.round = i
            sources = {entry: end if i else initial for initial, entry, end in loop.carried}
            carried = {entry: ops.carry(self.values[source]) for entry, source in sources.items()}
            self.values.update(carried)  # all at once: what one carries on may be the entry of another
            self.run(loop.body)
        self.round = 0
        for _, entry, _ in loop.carried:
            del self.values[entry]

    def rounds(self, loop: Loop) -> int:
        """Return how often a repeated region runs."""
        return loop.times

    def send(self, task: Send) -> None:
        """Hand a value to other programs; what lies in a parameter or state is copied, for that goes on."""
        value = tree_map(_detached, self.values[task.value])
        kept = memories(value).isdisjoint(self.written())
        self._connected().send(task, value if kept else tree_map(_copied, value))

    def written(self) -> set[int]:
        """Return the memory of the parameters and state that this and other instructions write."""
        raise NotImplementedError

    def receive(self, task: Receive) -> None:
        """Wait for a value of another program."""
        self.values[task.value] = self._connected().receive(task)

    def _connected(self) -> Channels:
        if self.channels is None:
            raise LoccError(
                "this is the program of some modules, which runs beside those of the others; run "
                "program.step, or give it channels"
            )
        return self.channels

    def protect(self, task: Update | Assign | Backward, written: Iterable[Tensor]) -> None:
        """Copy the values in flight that lie in memory which an instruction is about to write."""
        memory = {memory_of(tensor) for tensor in written}
        for name, value in self.values.items():
            if name not in task.frees and not memory.isdisjoint(memories(value)):
                self.values[name] = tree_map(_copied, value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
