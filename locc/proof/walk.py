"""Second check: a walk through autograd's own graph, on fake tensors, over two steps.

The training step runs without computing anything: fake tensors carry shapes, and PyTorch records the
tape that real ones would have. Where the plan back-propagates, the walk goes from the scalar's
`grad_fn` to the leaves instead. It sees what the graph of the program cannot show: what happens inside
the user's leaf modules, and values that Python state carries from one module, or step, to another.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locc.facts.names import Names
from locc.ir import TrainingGraph
from locc.ir.state import begin
from locc.lower import Backward, Plan, Segment
from locc.proof.experiment.batch import Batch, standing_in
from locc.proof.experiment.dispatch import Kernels
from locc.proof.experiment.runner import Runner, plans_of
from locc.proof.experiment.worlds import Fake, Meta, Real, reason
from locc.proof.findings import WALK, Finding
from locc.proof.tape import Record, Tape, sequence_number
from locc.snapshot import preserved

STEPS = 2


@dataclass
class Walk:
    """What the walk saw.

    Attributes:
        findings: violations.
        reached: objective -> the parameters at the end of its tape.
        weighted: gradient node -> whether that gradient is multiplied by trained matrices.
        strangers: leaves that require a gradient and are no parameter of the program, by shape.
        how: which tensors it ran on, and why, where they are real.
    """

    findings: list[Finding] = field(default_factory=list)
    reached: dict[str, set[str]] = field(default_factory=dict)
    weighted: dict[str, bool] = field(default_factory=dict)
    strangers: dict[str, None] = field(default_factory=dict)
    how: str = "fake tensors"


def check(ir: TrainingGraph, batch: Batch, plans: list[Plan] | None = None) -> Walk:
    """Walk every objective's tape; on tiny real tensors where the model cannot run on fake ones.

    Args:
        ir: the graph.
        batch: what to run on.
        plans: the graph's plans, if they are known (`plans_of`).

    Raises:
        Exception: whatever the model raises when it runs on real tensors.
    """
    why = ""
    for world in _WORLDS:
        try:
            walk = _walk(ir, batch, plans, world, trace=False)
        except Exception as error:  # data-dependent code, .item(), NumPy: anything may fail without data
            if world is Real:
                raise
            why = reason(error)
            continue
        walk.how = (
            world.title if world is not Real else f"tiny real tensors, since fake ones do not run ({why})"
        )
        break
    if walk.findings:
        with suppress(Exception):  # once more, recording which line made which part of the tape
            walk.findings = _walk(ir, batch, plans, world, trace=True).findings or walk.findings
    return walk


def _walk(ir: TrainingGraph, batch: Batch, plans: list[Plan] | None, kind: type[Real], trace: bool) -> Walk:
    walk = Walk()
    anomaly = torch.autograd.set_detect_anomaly(True, check_nan=False) if trace else nullcontext()
    with (
        warnings.catch_warnings(),
        preserved(ir.root, values=kind is Real),
        standing_in(ir, batch.stand_in),
        anomaly,
    ):
        warnings.simplefilter("ignore")
        world = kind()
        inputs = torch.utils._pytree.tree_map(world.of, [*batch.tensors, batch.target])
        begin(ir.root, batch.size)
        world.enter(ir)
        kernels = Kernels(world.kernel) if isinstance(world, Meta) else nullcontext()
        with kernels, world.mode:
            for plan in plans or plans_of(ir):
                walker = _Walker(ir, plan, walk, world)
                for _ in range(STEPS):
                    walker.step_on(inputs)
    walk.findings = list(dict.fromkeys(walk.findings))
    return walk


_WORLDS: tuple[type[Real], ...] = (Meta, Fake, Real)


class _Walker(Runner):
    drops = False  # what is in flight tells entries from strangers

    def __init__(self, ir: TrainingGraph, plan: Plan, walk: Walk, world: Real) -> None:
        super().__init__(ir, plan, world)
        self.walk = walk
        self.names = Names.of(ir)
        self.own = {owner: {id(p) for p in ir.parameters(owner).values()} for owner in ir.owners}
        self.record = Record()

    def segment(self, segment: Segment) -> None:
        start = sequence_number()
        super().segment(segment)
        self.record.add(start, sequence_number(), segment.owner, self.step)

    def differentiate(self, task: Backward, values: list[Tensor]) -> list[Tensor | None]:
        scalar = self.values[task.scalar]
        tape = Tape.of(scalar, self.world.stands_for)
        label = ", ".join(task.objectives) or task.scalar
        for finding in findings_of(
            tape, task.owner, label, self.names, self.own, self.record, self.step, WALK
        ):
            self.walk.findings.append(finding)
        for name in task.objectives:
            reached = self.walk.reached.setdefault(name, set())
            reached.update(self.names.parameters[i].path for i in tape.leaves if i in self.names.parameters)
        mine = {id(self.values[leaf]) for _, leaf in task.gradients}
        for i, (tensor, _) in tape.leaves.items():
            if i not in self.names.parameters and i not in mine and not self._entry(tensor):
                self.walk.strangers[f"{list(tensor.shape)} in objective '{label}'"] = None
        for name, leaf in task.gradients:
            through = tape.passes_through_weights(self.values[leaf], lambda p: id(p) in self.names.parameters)
            self.walk.weighted[name] = self.walk.weighted.get(name, False) or through
        return [None] * len(values)

    def _entry(self, leaf: Tensor) -> bool:
        return any(value is leaf for value in self.values.values())


def findings_of(
    tape: Tape,
    owner: str,
    label: str,
    names: Names,
    own: dict[str, set[int]],
    record: Record,
    step: int,
    check: str,
) -> Iterator[Finding]:
    """Yield what a tape reaches that is not its owner's, or not of this step."""
    named = False
    for i, (_, node) in tape.leaves.items():
        found = names.parameters.get(i)
        if found is not None and i not in own[owner]:
            named = True
            late = _late(tape, node, record, step)
            yield Finding(
                check,
                f"objective '{label}' of '{owner}' reaches parameter '{found.path}', "
                f"{names.home(found.tensor)}{late}",
                (label, *tape.path(node)[:-1], found.path),
                label,
                found.path,
                "detach the value where it enters the module (a reference to another module, a buffer or an "
                "attribute keeps it live)",
            )
    if named:
        return
    for node in tape.parent:
        maker = record.maker(node)
        if maker is None or (maker[1] == step and maker[0] == owner):
            continue
        when = "" if maker[1] == step else " in an earlier step"
        yield Finding(
            check,
            f"objective '{label}' of '{owner}' reaches the tape of '{maker[0]}'{when}",
            (label, *tape.path(node)),
            label,
            None,
            "detach what a buffer or an attribute keeps from one call to the next",
        )
        return


def _late(tape: Tape, leaf: Any, record: Record, step: int) -> str:
    node = leaf
    while node is not None:
        maker = record.maker(node)
        if maker is not None and maker[1] != step:
            return ", through a value that was kept from an earlier step"
        node = tape.parent.get(node)
    return ""
