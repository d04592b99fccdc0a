"""`diagnose`: what a researcher looks at when a program does not train, and what it says in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc import files
from locc.errors import LoccError, MethodError
from locc.ir import Owner, gradient
from locc.lower import Instruction, Plan, lower
from locc.nn import guess_layout
from locc.rewrite import has_rows, layout_at, spec_of
from locc.runtime import Compiled
from locc.runtime.evaluation import batch_of
from locc.runtime.program import FEW
from locc.runtime.progress import RandomState
from locc.runtime.streams import autocast, preserved_rng
from locc.runtime.untouched import untouched
from locc.snapshot import values_preserved

ROWS = 2048
"""Rows of a boundary value (samples, or their positions) from which its rank is taken."""
PIECE = 1 << 16
"""Numbers that are in double precision at a time."""


@dataclass(frozen=True)
class Health:
    """What was seen of one owner.

    Attributes:
        owner: a module, or an auxiliary.
        angle: degrees between what its optimizer gets and the true gradient, mean over the steps: 0 for
            backpropagation, 90 where they have nothing to do with each other. None for an auxiliary.
        moved: the length of an update in units of the length of its weights, mean over the steps.
        error: of an auxiliary: the squared distance of what it gives to what it should, in units of the
            variance of the latter; 0 is perfect, and 1 is what the mean would do as well.
        rank: effective rank of what the module sends: e to the entropy of its normalised singular values
            (Roy & Vetterli 2007). The lowest, where it sends several values.
        units: how many units that value has.
        dead: the share of its units that are constant over all samples.
    """

    owner: str
    angle: float | None = None
    moved: float | None = None
    error: float | None = None
    rank: float | None = None
    units: int | None = None
    dead: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What some steps showed of each owner, and what is wrong in words; an empty `verdicts` is good news."""

    owners: tuple[Health, ...]
    verdicts: tuple[str, ...]
    steps: int

    def __str__(self) -> str:
        head = ("", "angle", "update/weight", "error", "rank", "dead")
        rows = [head, *(_row(h) for h in self.owners)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        table = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        return "\n".join(
            [f"diagnosis after {self.steps} steps", *table, *(self.verdicts or ["nothing is amiss"])]
        )


def _row(h: Health) -> tuple[str, ...]:
    return (
        h.owner,
        "" if h.angle is None else f"{h.angle:.1f}",
        "" if h.moved is None else f"{h.moved:.1e}",
        "" if h.error is None else f"{h.error:.3g}",
        "" if h.rank is None else f"{h.rank:.1f} of {h.units}",
        "" if h.dead is None else f"{h.dead:.0%}",
    )


def diagnose(program: Compiled, loader: Iterable[Any], steps: int = 10) -> Diagnosis:
    """Train for some steps, look at every module, and leave the program as it was.

    For each step the true gradient is computed by backpropagation through the whole network, with the memory
    that this takes. Dropout and noise are drawn anew for it.

    Args:
        program: the program; parameters, optimizers, buffers, counters and random streams are afterwards as
            before, and so is the loader's own random state.
        loader: yields batches as `fit` takes them.
        steps: how many; fewer where the loader ends before.

    Raises:
        LoccError: `steps` is below 1, or the loader yields nothing.
        RunError: a step fails.
    """
    if type(steps) is not int or steps < 1:
        raise LoccError(f"steps={steps!r}: give a number of at least 1")
    if program.settings.visits:
        raise LoccError(
            "program.diagnose backpropagates through the whole network at once, which with offload='cpu' is "
            "never on the device; compile a smaller model without offload= for it"
        )
    random = RandomState.now(loader, program.device)
    try:
        within = program.settings.labels_within
        batches = [batch_of(batch, within) for batch in itertools.islice(loader, steps)]
    finally:
        random.restore(loader, program.device)
    if not batches:
        raise LoccError("the loader yielded no batch to diagnose")
    program.complete(batches[0][0], FEW)
    with untouched(program), _watching(program) as seen:
        for x, y in batches:
            seen.step(x, y)
    owners = tuple(seen.health(owner) for owner in program.ir.owners.values())
    return Diagnosis(owners, tuple(_verdicts(program, owners)), len(batches))


@dataclass
class _Seen:
    """What the steps leave."""

    program: Compiled
    plan: Plan
    judged: dict[str, list[fx.Node]]
    sent: dict[str, list[fx.Node]]
    true: dict[int, Tensor] = field(default_factory=dict)
    before: dict[str, list[Tensor]] = field(default_factory=dict)
    angles: dict[str, list[float]] = field(default_factory=dict)
    moved: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def step(self, x: Any, y: Any) -> None:
        """Take one step, and look at it."""
        program, executor = self.program, self.program.built.executor
        for key, true in _true_gradient(program, x, y).items():
            self.true[key] = files.put_away(self.true[key] + true) if key in self.true else true
        self.values = {}
        with program.in_phase():
            replace(executor, observe=self.observe, flags=[]).run(
                self.plan, program.bind(x, y), program.steps
            )
        program.steps += 1
        for owner, nodes in self.judged.items():
            self._judge(owner, [[self.values.get(a.name) for a in n.all_input_nodes[:2]] for n in nodes])
        for value in (v for nodes in self.sent.values() for v in nodes if v.name in self.values):
            held = self.rows.setdefault(value.name, [])
            if sum(len(r) for r in held) < ROWS:
                held.append(_as_rows(program, value, self.values[value.name]))

    def observe(self, instruction: Instruction, values: Mapping[str, Any]) -> None:
        """Keep the watched values that an instruction wrote."""
        watched = {a.name for nodes in self.judged.values() for n in nodes for a in n.all_input_nodes}
        watched |= {v.name for nodes in self.sent.values() for v in nodes}
        self.values.update({n: values[n].detach().clone() for n in instruction.writes if n in watched})

    def updating(self, owner: str, parameters: list[nn.Parameter]) -> None:
        """Look at what an optimizer is about to be given."""
        self.before[owner] = [p.detach().clone() for p in parameters]
        pairs = [
            (p.grad, self.true.pop(id(p))) for p in parameters if id(p) in self.true and p.grad is not None
        ]
        angle = _angle(pairs)
        if angle is not None:
            self.angles.setdefault(owner, []).append(angle)

    def updated(self, owner: str, parameters: list[nn.Parameter]) -> None:
        """Look at what an optimizer has done."""
        before = self.before.pop(owner)
        change = _length(p.detach() - b for p, b in zip(parameters, before, strict=True))
        self.moved.setdefault(owner, []).append(change / max(_length(before), 1e-30))

    def _judge(self, owner: str, pairs: list[list[Any]]) -> None:
        whole = [(a, b) for a, b in pairs if a is not None and b is not None]
        spread = sum(float((b - b.mean(0)).square().sum()) for _, b in whole)
        if spread > 0:
            missed = sum(float((a - b).square().sum()) for a, b in whole)
            self.errors.setdefault(owner, []).append(missed / spread)

    def health(self, owner: Owner) -> Health:
        """Return what was seen of an owner."""
        name = owner.name
        sent = [torch.cat(self.rows[v.name])[:ROWS] for v in self.sent.get(name, []) if v.name in self.rows]
        ranks = [(_effective_rank(rows), rows) for rows in sent if len(rows) > 1]
        rank, rows = min(ranks, key=lambda pair: pair[0]) if ranks else (None, None)
        return Health(
            name,
            None if owner.auxiliary else _mean(self.angles.get(name)),
            _mean(self.moved.get(name)),
            _mean(self.errors.get(name)),
            rank,
            None if rows is None else rows.shape[1],
            None if rows is None else float((rows == rows[0]).all(0).double().mean()),
        )


@contextmanager
def _watching(program: Compiled) -> Iterator[_Seen]:
    """Lower a step that shows what is to be seen, and look over the optimizers' shoulders."""
    ir = program.ir
    judged: dict[str, list[fx.Node]] = {}
    for node in ir.graph.nodes:
        if "judged" in node.meta:
            judged.setdefault(str(node.meta["owner"]), []).append(node)
    sent = {o.name: [v for v in ir.outputs(o.name) if has_rows(v)] for o in ir.modules[:-1]}
    active = None
    if program.settings.schedule == "sequential":
        active = next(frozenset(p.trains) for p in program.phases if p.name == program.phase)
    inputs = [a for nodes in judged.values() for n in nodes for a in n.all_input_nodes]
    seen = _Seen(
        program, lower(ir, active, [*inputs, *(v for nodes in sent.values() for v in nodes)]), judged, sent
    )
    hooks = []
    for name, learner in program.built.learners.items():
        optimizer, parameters = learner.optimizer, learner.parameters
        hooks.append(optimizer.register_step_pre_hook(_calling(seen.updating, name, parameters)))
        hooks.append(optimizer.register_step_post_hook(_calling(seen.updated, name, parameters)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _calling(
    look: Callable[[str, list[nn.Parameter]], None], owner: str, parameters: list[nn.Parameter]
) -> Any:
    def hook(*_: Any) -> None:
        look(owner, parameters)

    return hook


def _true_gradient(program: Compiled, x: Any, y: Any) -> dict[int, Tensor]:
    """Return the gradient of the user's loss with respect to each parameter, by the parameter's id."""
    parameters = [p for p in program.root.parameters() if p.requires_grad]
    dtype = program.built.executor.autocast
    with values_preserved(program.root), preserved_rng(program.device), program.in_phase():
        with autocast(program.device, dtype):
            loss = program.loss_function(program.predict(x), program.moved(y))
        found = files.gradients(loss, parameters)
    return {id(p): g.detach() for p, g in zip(parameters, found, strict=True) if g is not None}


def _as_rows(program: Compiled, value: fx.Node, found: Tensor) -> Tensor:
    """Return a boundary value as [samples or positions, units], at most `ROWS` of them."""
    spec = spec_of(value)
    try:
        rows = guess_layout(spec, layout_at(program.ir, value)).last(found).flatten(0, -2)
    except MethodError:  # no layout that anybody knows
        rows = found.movedim(spec.batch_dim or 0, 0).flatten(1)
    return rows[:: max(1, len(rows) // ROWS)][:ROWS]


def _effective_rank(rows: Tensor) -> float:
    """Return e to the entropy of the normalised singular values of centred rows; 0 where all are equal."""
    values = torch.linalg.svdvals((rows - rows.mean(0)).double())
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def _angle(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Return the angle between two lists of tensors, in degrees; None where one of them is zero."""
    lengths = [_length([pair[i] for pair in pairs]) for i in (0, 1)]
    if not all(0 < length < math.inf for length in lengths):
        return None
    inner = sum(_inner(a, b) for a, b in pairs)
    return math.degrees(math.acos(max(-1.0, min(1.0, inner / math.prod(lengths)))))


def _length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(_inner(t, t) for t in tensors))


def _inner(one: Tensor, other: Tensor) -> float:
    """Return the inner product in double precision, of which a piece at a time is in memory."""
    pieces = zip(*(t.to_dense().flatten().split(PIECE) for t in (one, other)), strict=True)
    return float(sum(torch.dot(a.double(), b.double()) for a, b in pieces))


def _mean(found: list[float] | None) -> float | None:
    return sum(found) / len(found) if found else None


def _verdicts(program: Compiled, owners: tuple[Health, ...]) -> Iterator[str]:
    """Yield what is wrong, the auxiliaries of a module first: they may be why the module does not learn."""
    for health in owners:
        owner = program.ir.owners[health.owner]
        if health.error is not None and health.error > 0.5:
            fails, remedy = next(n.meta["judged"] for n in program.ir.nodes(owner.name) if "judged" in n.meta)
            how = "nothing" if health.error > 0.9 else "little"
            module, _, kind = owner.name.rpartition(".")
            text = f"its {kind} {fails.format(how=how)} (error {health.error:.2g}); {remedy}"
            yield f"module '{module}': {text}"
    for health in owners:
        follows = _follows(program, health.owner)
        yield from (f"module '{health.owner}': {text}" for text in _complaints(health, follows))


def _follows(program: Compiled, owner: str) -> bool:
    """Whether a module is to follow the gradient: from another one, or as an auxiliary of its own says.

    One that has a goal of its own (a head, a label code) need not.
    """
    ir = program.ir
    behind: list[fx.Node] = list(ir.objectives(owner))
    seen = set(behind)
    for node in behind:
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        behind += new
    index = ir.owners[owner].index
    served = any("judged" in n.meta and ir.owners[n.meta["owner"]].index == index for n in ir.graph.nodes)
    return served or any(n.target is gradient for n in behind)


def _complaints(h: Health, follows: bool) -> Iterator[str]:
    if follows and h.angle is not None and h.angle > 80:
        how = "goes against" if h.angle > 100 else "has nothing to do with"
        yield (
            f"its update {how} the true gradient (angle {h.angle:.0f}); train on, for some methods align "
            "with time; if the angle stays, normalise its output or choose another method"
        )
    if h.moved is not None and h.moved > 0.1:
        yield f"an update is {h.moved:.0%} of its weights; lower the learning rate"
    if h.moved == 0:
        yield "its weights do not move: what reaches its optimizer is zero"
    if h.dead is not None and h.dead > 0.5:
        yield (
            f"{h.dead:.0%} of the {h.units} units that it sends are constant; lower the learning rate, or "
            "normalise before the nonlinearity"
        )
    if h.rank is not None and h.rank < 2:
        yield (
            f"what it sends has collapsed (effective rank {h.rank:.1f} of {h.units}); lower the learning "
            "rate, or normalise before the nonlinearity"
        )
