"""Third check: two steps that train, watched instruction by instruction.

Each backward pass and each optimizer step runs alone, and whatever it changes must be its owner's. It
sees what the tape does not show: hooks and custom functions that write gradients, re-entrant
checkpoints, optimizers that move other parameters, memory changed behind autograd's back (`.data`).
What is written is observed in PyTorch's dispatcher, so the check does not depend on sizes: it runs on
real tensors where two small steps are cheap, and on shapes alone where they are not. On real tensors,
values are compared as well: NumPy and foreign kernels write without the dispatcher.
The program is left bit for bit as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, optim

from locc.facts.names import Names, Owned, home
from locc.ir import TrainingGraph
from locc.ir.captured import strip
from locc.ir.state import begin
from locc.ir.view import DATA
from locc.lower import Assign, Backward, Instruction, Plan, Segment, Update
from locc.proof.experiment.batch import Batch, standing_in
from locc.proof.experiment.dispatch import Writes, memory_of
from locc.proof.experiment.runner import Trainer, plans_of
from locc.proof.experiment.worlds import Meta, Real
from locc.proof.findings import SENTINEL, Finding
from locc.proof.slots import Place, Slots
from locc.proof.storage import fingerprint
from locc.proof.tape import Record, Tape, sequence_number
from locc.proof.walk import findings_of
from locc.snapshot import preserved, same_bits

STEPS = 2
_HANDS_OFF = "hooks, custom functions and checkpoints may touch their module's parameters only"
_OWN_ONLY = "each module may change its own parameters, buffers and attributes only"


@dataclass
class Sentinel:
    """What the two steps showed.

    Attributes:
        findings: violations.
        received: objective -> the parameters that its backward pass gave a gradient.
        written: buffer or tensor attribute -> the owners whose code changed it.
        failure: why the steps could not be completed, or None.
        how: which tensors it ran on, and why, where shapes would have done.
    """

    findings: list[Finding] = field(default_factory=list)
    received: dict[str, set[str]] = field(default_factory=dict)
    written: dict[str, set[str]] = field(default_factory=dict)
    failure: str | None = None
    how: str = Real.title


class _StopError(Exception):
    """Something was found, or the step cannot go on."""


def check(
    ir: TrainingGraph,
    optimizers: Mapping[str, optim.Optimizer],
    batch: Batch,
    plans: list[Plan] | None = None,
    real: bool = True,
) -> Sentinel:
    """Run two steps on a snapshot and watch.

    Args:
        ir: the graph.
        optimizers: the optimizer of each owner that trains.
        batch: what to run on.
        plans: the graph's plans, if they are known (`plans_of`).
        real: on real tensors; otherwise on shapes alone, if the program runs so.
    """
    setting = _Setting(ir, optimizers, batch, plans)
    why = ""
    if not real:
        found = setting.watched(Meta)
        if found.failure is None:
            return found
        why = f", as shapes alone do not run ({found.failure})"
    found = setting.watched(Real)
    if found.failure is not None and "rule registered for HOP" in found.failure:
        # A higher-order operator admits no observer: values are compared after every instruction instead.
        found = setting.run(Real(), strict=True, observed=False)
    found.how += why
    return found


@dataclass(frozen=True)
class _Setting:
    ir: TrainingGraph
    optimizers: Mapping[str, optim.Optimizer]
    batch: Batch
    plans: list[Plan] | None

    def watched(self, world: type[Real]) -> Sentinel:
        """Run the steps; where something changed unseen, again, looking after every instruction."""
        found = self.run(world(), strict=False)
        unseen = any(finding.objective is None for finding in found.findings)
        return self.run(world(), strict=True) if unseen else found

    def run(self, world: Real, strict: bool, observed: bool = True) -> Sentinel:
        ir, batch, optimizers = self.ir, self.batch, self.optimizers
        result = Sentinel(how=world.title)
        with (
            warnings.catch_warnings(),
            preserved(ir.root, optimizers.values(), values=not isinstance(world, Meta)),
            standing_in(ir, batch.stand_in),
        ):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            inputs = torch.utils._pytree.tree_map(world.of, [*batch.tensors, batch.target])
            begin(ir.root, batch.size)
            world.enter(ir, optimizers.values())
            for plan in self.plans or plans_of(ir):
                writes = Writes(world.kernel) if observed else None
                watch = _Watch(ir, plan, optimizers, result, world, writes, strict)
                try:
                    with writes or nullcontext():
                        for _ in range(STEPS):
                            watch.step_on([world.of(v) for v in inputs])
                            watch.compare(None)
                except _StopError:
                    break
        result.findings = list(dict.fromkeys(result.findings))
        return result


class _Watch(Trainer):
    """One plan, with the state that each instruction must leave alone."""

    def __init__(
        self,
        ir: TrainingGraph,
        plan: Plan,
        optimizers: Mapping[str, optim.Optimizer],
        result: Sentinel,
        world: Real,
        writes: Writes | None,
        strict: bool,
    ) -> None:
        super().__init__(ir, plan, optimizers, world)
        self.result, self.writes, self.strict = result, writes, strict
        self.names = Names.of(ir)
        self.own = {owner: {id(p) for p in ir.parameters(owner).values()} for owner in ir.owners}
        self.record = Record()
        self.slots = Slots(ir)
        self.kinds: dict[int, str] = {}
        self.tracked: dict[int, Owned] = {}
        self.home: dict[int, int | None] = {}
        self.lying: dict[int | None, set[int]] = {}
        self.before: dict[int, Tensor] = {}
        for kind, items in self._state():
            for item in items:
                self._track(kind, item)
        self.settings = {owner: fingerprint(o) for owner, o in optimizers.items()}
        self.owned = list(self.names.parameters.values())
        self.tensors = [item.tensor for item in self.owned]
        self.trains = [t.requires_grad for t in self.tensors]
        self.gradients = self._gradients()
        self.gradient_memory: dict[int | None, set[int]] = {}
        self.readers = {n.name: {str(u.meta.get("owner")) for u in n.users} for n in ir.graph.nodes}

    def _state(self) -> Iterable[tuple[str, Iterable[Owned]]]:
        yield "parameter", self.names.parameters.values()
        yield "buffer", self.names.buffers.values()
        yield "tensor", (Owned(p.path, t, p.owners) for p, t in self.slots.attributes() if p.owners)

    def _track(self, kind: str, item: Owned) -> None:
        key = id(item.tensor)
        self.kinds[key], self.tracked[key] = kind, item
        self._note(key)

    def _note(self, key: int) -> None:
        """Remember where a tensor lies and, on real tensors, what it holds."""
        tensor = self.tracked[key].tensor
        self.lying.get(self.home.get(key), set()).discard(key)
        self.home[key] = memory_of(tensor)
        self.lying.setdefault(self.home[key], set()).add(key)
        if tensor.device.type != "meta":
            held = self.before.get(key)
            if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
                held.copy_(tensor.detach())
            else:
                self.before[key] = tensor.detach().clone()

    # ---- instructions -----------------------------------------------------------------------

    def segment(self, segment: Segment) -> None:
        entering = [
            (name, value, value.detach().clone())
            for name in segment.reads
            if self._foreign(name, segment.owner)
            for value in torch.utils._pytree.tree_leaves(self.values[name])
            if isinstance(value, Tensor)
        ]
        start = sequence_number()
        try:
            super().segment(segment)
        except Exception as error:
            self._fail(f"the forward of '{segment.owner}' fails", error)
        self.record.add(start, sequence_number(), segment.owner, self.step)
        written = self._written()
        for name, value, before in entering:
            if memory_of(value) in written or not (value.is_meta or same_bits(value.detach(), before)):
                self._found(
                    f"the forward of '{segment.owner}' changes '{name}', a value of '{self.maker[name]}', "
                    "in place",
                    segment,
                    name,
                    "use an out-of-place operation there, or clone the input",
                )
        self._after(segment, written)

    def _foreign(self, name: str, owner: str) -> bool:
        maker = self.maker.get(name)
        return maker != owner and (maker != DATA or bool(self.readers.get(name, set()) - {owner}))

    def backward(self, task: Backward) -> None:
        try:
            super().backward(task)
        except Exception as error:
            self._backward_failed(task, self.values[task.scalar], error)
        fresh = {self.owned[i].path for i, found in self._changed_gradients() if found is not None}
        for name in task.objectives:
            self.result.received.setdefault(name, set()).update(fresh)
        self._after(task, self._written())

    def assign(self, task: Assign) -> None:
        super().assign(task)
        self._after(task, self._written())

    def update(self, task: Update) -> None:
        optimizer = self.optimizers.get(task.owner)
        if optimizer is not None and fingerprint(optimizer) != self.settings[task.owner]:
            self._found(
                f"the settings or state of the optimizer of '{task.owner}' change outside its own step",
                task,
                f"the optimizer of '{task.owner}'",
                "an optimizer may change its own learning rate, momentum and state only",
            )
        try:
            super().update(task)
        except Exception as error:
            self._fail(f"the optimizer of '{task.owner}' fails", error)
        if optimizer is not None:
            self.settings[task.owner] = fingerprint(optimizer)
        self._after(task, self._written())

    def drop_gradients(self, owner: str) -> None:
        """Keep them, as under accumulation, so that it shows if others touch them."""

    # ---- what changed -----------------------------------------------------------------------

    def _written(self) -> set[int]:
        return self.writes.take() if self.writes is not None else set()

    def _gradients(self) -> list[tuple[int, int] | None]:
        """Describe the gradient of each parameter by what is quick to read."""
        return [None if (g := t.grad) is None else (id(g), g._version) for t in self.tensors]

    def _changed_gradients(self) -> list[tuple[int, tuple[int, int] | None]]:
        found = self._gradients()
        if found == self.gradients:
            return []
        pairs = enumerate(zip(self.gradients, found, strict=True))
        return [(i, new) for i, (old, new) in pairs if old != new]

    def _after(self, instruction: Instruction, written: set[int]) -> None:
        """Blame the instruction for every change that is not its owner's to make."""
        self._look_at_gradients(instruction, written)
        for memory in written:
            lying = sorted(self.lying.get(memory, ()))
            keys = [key for key in lying if memory_of(self.tracked[key].tensor) == memory]
            for key in keys:  # in memory that several share, what counts is whose values changed
                if len(keys) == 1 or key not in self.before or self._differs(key):
                    self._changed(key, instruction)
        for place, _, new in self.slots.changes(everywhere=self.strict):
            self._replaced(place, new, instruction)
        if self.strict:
            self.compare(instruction)
        if self.result.findings:
            raise _StopError

    def _look_at_gradients(self, instruction: Instruction, written: set[int]) -> None:
        trains = [t.requires_grad for t in self.tensors]
        if trains != self.trains:
            for item, old, new in zip(self.owned, self.trains, trains, strict=True):
                if old != new:
                    self._touched("switches requires_grad of parameter", item, instruction)
            self.trains = trains
        changed = dict(self._changed_gradients())
        for memory in written & self.gradient_memory.keys():
            for i in self.gradient_memory[memory]:
                gradient = self.tensors[i].grad
                if gradient is not None and memory_of(gradient) == memory:
                    changed[i] = (id(gradient), gradient._version)
        for i in sorted(changed):
            self.gradients[i], gradient = changed[i], self.tensors[i].grad
            if gradient is not None:
                self.gradient_memory.setdefault(memory_of(gradient), set()).add(i)
            did = "removes" if gradient is None else "writes"
            self._touched(f"{did} the gradient of parameter", self.owned[i], instruction, _HANDS_OFF)

    def compare(self, instruction: Instruction | None) -> None:
        """Look for changes that no operator made: memory written by other code, tensors that moved."""
        for key, item in list(self.tracked.items()):
            if memory_of(item.tensor) != self.home[key] or (key in self.before and self._differs(key)):
                self._changed(key, instruction)
        if instruction is None:
            for place, _, _ in self.slots.changes(everywhere=True):
                if place.owners:
                    self._found(f"{place.kind} '{place.path}' is replaced", None, place.path, "")
        if self.result.findings:
            raise _StopError

    def _differs(self, key: int) -> bool:
        return not same_bits(self.tracked[key].tensor.detach(), self.before[key])

    def _changed(self, key: int, instruction: Instruction | None) -> None:
        self._note(key)
        kind, item = self.kinds[key], self.tracked[key]
        if instruction is None:
            # Seen only at the end of the step: nobody is known to have done it yet.
            self._found(f"{kind} '{item.path}' is changed past PyTorch's operators", None, item.path, "")
            return
        if kind == "buffer":
            self.result.written.setdefault(item.path, set()).add(instruction.owner)
        self._touched(f"changes {kind}", item, instruction)

    def _replaced(self, place: Place, new: Any, instruction: Instruction) -> None:
        """Judge that a module now holds something else in a place, and watch that as well."""
        if place.kind == "buffer":
            self.result.written.setdefault(place.path, set()).add(instruction.owner)
        elif place.kind == "attribute" and isinstance(new, Tensor):
            self.result.written.setdefault(place.path, set()).update(place.owners)
        if not place.owners:  # what no owner runs, such as the model itself, may keep what it likes
            return
        item = Owned(place.path, new, place.owners)
        self._touched(f"replaces {place.kind}", item, instruction)
        if isinstance(new, Tensor) and id(new) not in self.tracked:
            self._track("tensor" if place.kind == "attribute" else place.kind, item)

    def _touched(self, what: str, item: Owned, instruction: Instruction, remedy: str = _OWN_ONLY) -> None:
        if instruction.owner not in item.owners:
            text = f"{_doing(instruction)} {what} '{item.path}', {home(item.owners)}"
            self._found(text, instruction, item.path, remedy)

    # ---- verdicts ---------------------------------------------------------------------------

    def _found(self, text: str, instruction: Instruction | None, tensor: str, remedy: str) -> None:
        label = None
        if isinstance(instruction, Backward):
            label = ", ".join(instruction.objectives) or instruction.scalar
        elif instruction is not None:
            label = instruction.owner
        when = f" in step {self.step + 1}" if self.step else ""
        self.result.findings.append(Finding(SENTINEL, text + when, (), label, strip(tensor), remedy))

    def _backward_failed(self, task: Backward, scalar: Tensor, error: Exception) -> None:
        label = ", ".join(task.objectives) or task.scalar
        tape = Tape.of(scalar)
        self.result.findings += findings_of(
            tape, task.owner, label, self.names, self.own, self.record, self.step, SENTINEL
        )
        first = (str(error).strip().splitlines() or [""])[0]
        if not self.result.findings and "inplace operation" in str(error):
            self._found(
                f"objective '{label}' of '{task.owner}' cannot be back-propagated: a value that it needs "
                f"was changed in place by another module ({first[:160]})",
                task,
                task.scalar,
                "use an out-of-place operation on what a module receives, or clone it first",
            )
        if self.result.findings:
            raise _StopError from error
        self._fail(f"the backward pass of objective '{label}' fails", error)

    def _fail(self, what: str, error: Exception) -> None:
        first = (str(error).strip().splitlines() or [""])[0]
        self.result.failure = f"{what}: {type(error).__name__}: {first[:200]}"
        raise _StopError from error


def _doing(instruction: Instruction) -> str:
    if isinstance(instruction, Backward):
        label: Any = ", ".join(instruction.objectives) or instruction.scalar
        return f"the backward pass of objective '{label}' of '{instruction.owner}'"
    if isinstance(instruction, Update):
        return f"the optimizer step of '{instruction.owner}'"
    return f"the forward of '{instruction.owner}'"
