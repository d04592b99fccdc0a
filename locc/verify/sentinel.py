"""Third check: two real steps on a tiny batch, watched instruction by instruction.

Each backward pass and each optimizer step runs alone, and whatever it changes must be its owner's. It
sees what the tape does not show: hooks and custom functions that write gradients, re-entrant
checkpoints, optimizers that move other parameters, memory changed behind autograd's back (`.data`).
The program is left bit for bit as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, optim

from locc.ir import TrainingGraph
from locc.ir.captured import strip
from locc.ir.graph import DATA
from locc.lower import Backward, Instruction, Plan, Segment, Update
from locc.verify.batch import Batch, standing_in
from locc.verify.findings import SENTINEL, Finding
from locc.verify.names import Names, Owned
from locc.verify.runner import Runner, plans_of
from locc.verify.snapshot import bits, preserved, same_bits
from locc.verify.tape import Record, Tape, sequence_number
from locc.verify.walk import findings_of

STEPS = 2
_SMALL = 1 << 14
"""Tensors of up to so many elements are compared after every instruction, larger ones after each step."""


@dataclass
class Sentinel:
    """What the two steps showed.

    Attributes:
        findings: violations.
        received: objective -> the parameters that its backward pass gave a gradient.
        written: buffer -> the owners whose code changed it.
        failure: why the steps could not be completed, or None.
    """

    findings: list[Finding] = field(default_factory=list)
    received: dict[str, set[str]] = field(default_factory=dict)
    written: dict[str, set[str]] = field(default_factory=dict)
    failure: str | None = None


class _StopError(Exception):
    """Something was found, or the step cannot go on."""


def check(ir: TrainingGraph, optimizers: Mapping[str, optim.Optimizer], batch: Batch) -> Sentinel:
    """Run two steps on a snapshot and watch."""
    plans = plans_of(ir)
    found = _run(ir, optimizers, batch, plans, strict=False)
    if any(f.objective is None for f in found.findings):
        # A large tensor was changed behind the version counter: compare everything, always, to see by whom.
        found = _run(ir, optimizers, batch, plans, strict=True)
    return found


def _all(names: Names) -> list[Owned]:
    return [*names.parameters.values(), *names.buffers.values()]


def _run(
    ir: TrainingGraph,
    optimizers: Mapping[str, optim.Optimizer],
    batch: Batch,
    plans: list[Plan],
    strict: bool,
) -> Sentinel:
    result = Sentinel()
    with preserved(ir.root, optimizers.values()), standing_in(ir, batch.stand_in):
        torch.manual_seed(0)
        if batch.stand_in:
            plans = plans_of(ir)
        for plan in plans:
            watch = _Watch(ir, plan, optimizers, result, strict)
            try:
                for _ in range(STEPS):
                    watch.run([*[t.clone() for t in batch.tensors], batch.target])
                    watch.compare(None, strict=True)
            except _StopError:
                break
    result.findings = list(dict.fromkeys(result.findings))
    return result


class _Watch(Runner):
    """One plan, with the state that each instruction must leave alone."""

    def __init__(
        self,
        ir: TrainingGraph,
        plan: Plan,
        optimizers: Mapping[str, optim.Optimizer],
        result: Sentinel,
        strict: bool,
    ) -> None:
        super().__init__(ir, plan)
        self.optimizers, self.result, self.strict = optimizers, result, strict
        self.names = Names.of(ir)
        self.own = {owner: {id(p) for p in ir.parameters(owner).values()} for owner in ir.owners}
        self.record = Record()
        self.tensors = {id(o.tensor): o for o in _all(self.names)}
        self.large = {i: o.tensor for i, o in self.tensors.items() if o.tensor.numel() > _SMALL}
        self.values_before = {i: t.detach().clone() for i, t in self.large.items()}
        self.versions = {i: t._version for i, t in self.large.items()}
        self.small = _groups({i: o.tensor for i, o in self.tensors.items() if i not in self.large})
        self.packed = [group.pack() for group in self.small]
        self.gradients: dict[int, tuple[int, int]] = {}
        self.readers = {n.name: {str(u.meta.get("owner")) for u in n.users} for n in ir.graph.nodes}

    # ---- instructions -----------------------------------------------------------------------

    def segment(self, segment: Segment) -> None:
        entering = [
            (name, value, value.detach().clone())
            for name in segment.reads
            if isinstance(value := self.values[name], Tensor) and self._foreign(name, segment.owner)
        ]
        start = sequence_number()
        try:
            super().segment(segment)
        except Exception as error:
            self._fail(f"the forward of '{segment.owner}' fails", error)
        self.record.add(start, sequence_number(), segment.owner, self.step)
        for name, value, before in entering:
            if not same_bits(value.detach(), before):
                self._found(
                    f"the forward of '{segment.owner}' changes '{name}', a value of '{self.maker[name]}', "
                    "in place",
                    segment,
                    name,
                    "use an out-of-place operation there, or clone the input",
                )
        self._after(segment)

    def _foreign(self, name: str, owner: str) -> bool:
        maker = self.maker.get(name)
        return maker != owner and (maker != DATA or bool(self.readers.get(name, set()) - {owner}))

    def backward(self, task: Backward) -> None:
        scalar: Tensor = self.values[task.scalar]
        leaves = [self.values[leaf] for _, leaf in task.gradients]
        found: list[Tensor | None] = [None] * len(leaves)
        if scalar.requires_grad:
            try:
                if task.objectives:
                    scalar.backward(retain_graph=task.retain)
                    found = [leaf.grad for leaf in leaves]
                    for leaf in leaves:
                        leaf.grad = None
                else:
                    found = list(
                        torch.autograd.grad(scalar, leaves, retain_graph=task.retain, allow_unused=True)
                    )
            except Exception as error:
                self._backward_failed(task, scalar, error)
        for name in task.objectives:
            received = self.result.received.setdefault(name, set())
            received.update(o.path for o in self.names.parameters.values() if self._new_gradient(o.tensor))
        self._after(task)
        self.gradients_of(task, found)

    def update(self, task: Update) -> None:
        optimizer = self.optimizers.get(task.owner)
        if optimizer is not None:
            try:
                optimizer.step()
            except Exception as error:
                self._fail(f"the optimizer of '{task.owner}' fails", error)
        self._after(task)
        for item in self.names.parameters.values():
            if id(item.tensor) in self.own[task.owner]:
                item.tensor.grad = None
                self.gradients.pop(id(item.tensor), None)

    # ---- what changed -----------------------------------------------------------------------

    def _new_gradient(self, tensor: Tensor) -> bool:
        gradient = tensor.grad
        return gradient is not None and self.gradients.get(id(tensor)) != (id(gradient), gradient._version)

    def _after(self, instruction: Instruction) -> None:
        own = self.own[instruction.owner]
        for i, item in self.names.parameters.items():
            if self._new_gradient(item.tensor):
                gradient = item.tensor.grad
                assert gradient is not None
                self.gradients[i] = (id(gradient), gradient._version)
                if i not in own:
                    self._found(
                        f"{_doing(instruction)} writes the gradient of parameter '{item.path}', "
                        f"{self.names.home(item.tensor)}",
                        instruction,
                        item.path,
                        "hooks, custom functions and checkpoints may touch their module's parameters only",
                    )
        self.compare(instruction, self.strict)

    def compare(self, instruction: Instruction | None, strict: bool) -> None:
        """Look for a parameter or buffer that changed and is not the instruction's to change.

        Small tensors are compared bit by bit, all at once; large ones where autograd counted a change,
        and, if `strict`, all of them: `.data` and some kernels write without counting.
        """
        for group, before in zip(self.small, self.packed, strict=True):
            now = group.pack()
            if not same_bits(now, before):
                for i in group.changed(now, before):
                    self._changed(self.tensors[i], instruction)
                before.copy_(now)
        for i, tensor in self.large.items():
            if strict or tensor._version != self.versions[i]:
                self._look(i, instruction)
        if self.result.findings:
            raise _StopError

    def _look(self, i: int, instruction: Instruction | None) -> None:
        item, before = self.tensors[i], self.values_before[i]
        self.versions[i] = item.tensor._version
        if not same_bits(item.tensor.detach(), before):
            before.copy_(item.tensor.detach())
            self._changed(item, instruction)

    def _changed(self, item: Owned, instruction: Instruction | None) -> None:
        kind = "parameter" if id(item.tensor) in self.names.parameters else "buffer"
        if instruction is None:
            # Seen only at the end of the step: somebody wrote past autograd's version counter.
            self._found(f"{kind} '{item.path}' is changed through .data or an alias", None, item.path, "")
            return
        if kind == "buffer":
            self.result.written.setdefault(item.path, set()).add(instruction.owner)
        if instruction.owner in item.owners:
            return
        self._found(
            f"{_doing(instruction)} changes {kind} '{item.path}', {self.names.home(item.tensor)}",
            instruction,
            item.path,
            "each module may change its own parameters and buffers only",
        )

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


@dataclass
class _Group:
    """Small tensors of one dtype and device, compared together."""

    names: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def pack(self) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in self.tensors])

    def changed(self, now: Tensor, before: Tensor) -> list[int]:
        places = (bits(now) != bits(before)).nonzero()[:, 0].cpu()
        rows = torch.bucketize(places, torch.tensor(self.ends), right=True).unique()
        return [self.names[row] for row in rows.tolist()]


def _groups(tensors: dict[int, Tensor]) -> list[_Group]:
    found: dict[Any, _Group] = {}
    for i, tensor in tensors.items():
        if tensor.numel():
            group = found.setdefault((tensor.dtype, tensor.device), _Group())
            group.names.append(i)
            group.tensors.append(tensor)
            group.ends.append((group.ends[-1] if group.ends else 0) + tensor.numel())
    return list(found.values())


def _doing(instruction: Instruction) -> str:
    if isinstance(instruction, Backward):
        label: Any = ", ".join(instruction.objectives) or instruction.scalar
        return f"the backward pass of objective '{label}' of '{instruction.owner}'"
    if isinstance(instruction, Update):
        return f"the optimizer step of '{instruction.owner}'"
    return f"the forward of '{instruction.owner}'"
