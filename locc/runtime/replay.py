"""Modules that train at their own pace, on what a buffer keeps of the module below: `schedule="replay"`.

Belilovsky, Eickenberg & Oyallon, "Decoupled greedy learning of CNNs" (2020), and the buffers of its released
code.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locc.errors import CheckpointError, LoccError, nearest
from locc.lower import ModuleProgram
from locc.runtime.executor import Executor
from locc.runtime.machine import Held
from locc.runtime.streams import stream
from locc.runtime.waves import Updated

LIFO, FIFO = "priority-lifo", "fifo"
POLICIES = (LIFO, FIFO)
WARM = 2
"""Batches that go through all modules in order before the turns are drawn, as released."""


@dataclass(frozen=True)
class Replay:
    """How modules replay.

    Attributes:
        buffer: batches that each module but the first keeps of what it receives; 0 is lock-step training.
        policy: "priority-lifo" reads the newest of the least used batches; "fifo" each batch once, in order.
        reuse: how often a module may train on one batch, under "priority-lifo".
        slow: by how much a module is slowed down, by its name: it has 1 - slow as many turns.
    """

    buffer: int = 50
    policy: str = LIFO
    reuse: int = 10
    slow: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.buffer) is not int or self.buffer < 0:
            raise LoccError(
                f"buffer={self.buffer!r}: give the number of batches that a module keeps, 0 or more"
            )
        if self.policy not in POLICIES:
            raise LoccError(f"policy={self.policy!r} is unknown; {nearest(str(self.policy), POLICIES)}")
        if type(self.reuse) is not int or self.reuse < 1:
            raise LoccError(f"reuse={self.reuse!r}: give how often a module may train on a batch, at least 1")
        for name, slow in self.slow.items():
            if not isinstance(slow, (int, float)) or not 0 <= slow < 1:
                raise LoccError(
                    f"slow={{'{name}': {slow!r}}}: give a share of the turns that it loses, from 0 to below 1"
                )

    def check(self, modules: Sequence[str]) -> None:
        """Refuse a slow-down of what is no module.

        Raises:
            LoccError: it names one that is not there.
        """
        for name in self.slow:
            if name not in modules:
                raise LoccError(f"slow= names '{name}', which is no module; {nearest(name, modules)}")

    def __str__(self) -> str:
        if not self.buffer:
            return "buffers of 0 batches: lock-step"
        last = f", each read up to {self.reuse} times" if self.policy == LIFO else ", each read once"
        return f"in replay: each module from buffers of {self.buffer} batches, {self.policy}{last}"


@dataclass
class Batch:
    """One batch on its way: what it is bound to, and what modules have computed of it so far.

    `uses` counts from 1, as the released code does: a batch that is written counts as used once.
    """

    inputs: list[Any]
    values: dict[str, Any]
    uses: int = 1


@dataclass
class Workers:
    """The modules of a program, each with its buffer and its own count of steps.

    Attributes:
        rules: how they replay.
        programs: of the modules, as `waves.ordered` returns them.
        buffers: of each module, oldest first.
        steps: that each module has made, from which its random streams are counted.
        turns: that were drawn.
        batches: that the first module has taken.
        own: those that run here, by place; all of them in one process.
        hand: takes what the last of these makes for the next ones, where they run elsewhere.
        seconds: that the last step here has taken.
    """

    rules: Replay
    programs: Sequence[ModuleProgram]
    buffers: list[list[Batch]]
    steps: list[int]
    turns: int = 0
    batches: int = 0
    last: tuple[dict[str, Tensor], Tensor | None] = field(default_factory=lambda: ({}, None))
    own: range = range(0)
    hand: Callable[[Batch], None] | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, rules: Replay, programs: Sequence[ModuleProgram], step: int) -> Workers:
        """Return workers with empty buffers, that have made `step` steps."""
        every = range(len(programs))
        return cls(rules, programs, [[] for _ in every], [step for _ in every], own=every)

    def run(
        self, executor: Executor, values: list[Any], updated: Updated
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Draw turns until the first module has taken a batch.

        Args:
            executor: runs a program on a batch.
            values: of a plan's inputs, for the batch.
            updated: is told of each module's step.

        Returns:
            The objectives of each module and the loss, as of the last step of each.

        Raises:
            RunError: see `Executor.run`.
        """
        batch, moved = Batch(values, {}), list[str]()
        for index in self._turns(executor.seed):
            read = batch if index == 0 else self._read(index)
            if read is not None:  # otherwise there is nothing to train on, and the turn passes
                self._train(executor, index, read, moved, updated)
        self.batches += 1
        return self.last

    def turn(self, executor: Executor, updated: Updated) -> tuple[dict[str, Tensor], Tensor | None]:
        """Draw turns until a module has trained, where the first one runs elsewhere and one is `ready`."""
        while True:
            index = self._drawn(executor.seed)
            read = None if index is None else self._read(index)
            if index is not None and read is not None:
                self._train(executor, index, read, [], updated)
                return self.last

    def ready(self) -> bool:
        """Whether a module that runs here has something to read, but for the first of all."""
        return any(self._next(index) is not None for index in self.own if index)

    def _train(self, executor: Executor, index: int, read: Batch, moved: list[str], updated: Updated) -> None:
        started = time.perf_counter()
        part, mail = self.programs[index], Held(dict(read.values))
        objectives, loss = executor.run(part.plan, read.inputs, self.steps[index], mail, moved)
        self.steps[index] += 1
        known, before = self.last
        self.last = known | objectives, before if loss is None else loss
        if index + 1 < len(self.programs):
            self.write(index + 1, Batch(read.inputs, self._left(mail.values, index + 1)))
        updated(0, part.owners, objectives)
        self.seconds = time.perf_counter() - started

    def packed(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return this as JSON, for a checkpoint; its tensors are added to `tensors`, each once.

        Raises:
            CheckpointError: a batch holds what JSON does not.
        """
        names: dict[int, str] = {}

        def pack(value: Any) -> Any:
            return packed(value, tensors, names)

        return {
            "buffers": [[[pack(b.inputs), pack(b.values), b.uses] for b in held] for held in self.buffers],
            "steps": self.steps,
            "turns": self.turns,
            "batches": self.batches,
            "last": pack(self.last),
        }

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over what `packed` took apart."""

        def unpack(value: Any) -> Any:
            return unpacked(value, tensors, device)

        self.buffers = [[Batch(unpack(i), unpack(v), n) for i, v, n in held] for held in plain["buffers"]]
        self.steps, self.turns, self.batches = plain["steps"], plain["turns"], plain["batches"]
        self.last = unpack(plain["last"])

    def _turns(self, seed: int) -> Iterator[int]:
        """Yield whose turn it is; the first module's ends them, unless all go in order."""
        if not self.rules.buffer or self.batches < WARM:
            yield from self.own
            return
        drawn = None
        while drawn != 0:
            drawn = self._drawn(seed)
            if drawn is not None:
                yield drawn

    def _drawn(self, seed: int) -> int | None:
        """Draw whose turn it is: None, after the time of a step, where all who run here are slowed down."""
        weights = [1.0 - self.rules.slow.get(self.programs[index].name, 0.0) for index in self.own]
        generator = random.Random(stream(seed, self.turns, "turns"))
        self.turns += 1
        if self.hand is not None and generator.random() > max(weights):
            time.sleep(self.seconds)
            return None
        return generator.choices(self.own, weights)[0]

    def _next(self, index: int) -> Batch | None:
        """Return what a module reads next, if it has anything to train on."""
        buffer = self.buffers[index]
        if not buffer:
            return None
        if not self.rules.buffer or self.rules.policy == FIFO:
            return buffer[0]
        fewest = min(batch.uses for batch in buffer)
        if fewest > self.rules.reuse:
            return None
        return next(batch for batch in reversed(buffer) if batch.uses == fewest)

    def _read(self, index: int) -> Batch | None:
        found = self._next(index)
        if found is not None and (not self.rules.buffer or self.rules.policy == FIFO):
            self.buffers[index].pop(0)
        elif found is not None:
            found.uses += 1
        return found

    def write(self, index: int, batch: Batch) -> None:
        """Keep a batch for a module; the oldest one goes where there are too many."""
        if index not in self.own:
            if self.hand is not None:
                self.hand(self._needed(batch, index))
            return
        buffer = self.buffers[index]
        buffer.append(batch)
        del buffer[: -max(self.rules.buffer, 1)]

    def _needed(self, batch: Batch, start: int) -> Batch:
        """Return a batch without what no module from `start` on reads of the data."""
        read = frozenset[str]().union(*(part.plan.read for part in self.programs[start:]))
        names = self.programs[start].plan.inputs
        inputs = [v if name in read else None for name, v in zip(names, batch.inputs, strict=True)]
        return Batch(inputs, batch.values)

    def _left(self, values: dict[str, Any], start: int) -> dict[str, Any]:
        """Return what modules from `start` on still read."""
        read = {r.name for part in self.programs[start:] for r in part.receives}
        return {name: value for name, value in values.items() if name in read}


def packed(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """Return a value as JSON keeps it, and its tensors in `tensors`; `names` knows those that are there."""
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = str(len(tensors))
            tensors[names[id(value)]] = value
        return {"tensor": names[id(value)]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [packed(v, tensors, names) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[packed(k, tensors, names), packed(v, tensors, names)] for k, v in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"a batch that is kept for replay holds a {type(value).__name__}, which a checkpoint without pickle "
        "cannot keep"
    )


def unpacked(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Return what `packed` took apart."""
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held].to(device)
    if kind == "dict":
        return {unpacked(k, tensors, device): unpacked(v, tensors, device) for k, v in held}
    items = [unpacked(v, tensors, device) for v in held]
    return items if kind == "list" else tuple(items)
