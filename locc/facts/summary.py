"""A certificate in twenty lines, whatever the number of modules: what repeats is folded, with its count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from locc.facts.page import WIDTH, size, wrapped
from locc.facts.records import OwnerFacts
from locc.facts.statement import Statement
from locc.facts.traffic import Flow

LINES = 20
_LABEL = 15


def summary(certificate: Statement) -> list[str]:
    """Return the lines: verdict, checks, the program, the kinds of modules, and what is to be known."""
    head = [*_verdict(certificate), *_checks(certificate), *_program(certificate)]
    tail = [
        *_said("couplings", [str(c) for c in certificate.couplings]),
        *_said("warnings", list(certificate.warnings)),
        _line("graph", f"sha256 {certificate.graph_hash}; more: text(verbose=True)"),
    ]
    return [*head, *_modules(certificate, LINES - len(head) - len(tail)), *tail]


def _line(label: str, text: str) -> str:
    """Return one line; what does not fit is cut, visibly."""
    line = f"  {label:<{_LABEL}} {text}"
    return line if len(line) <= WIDTH else line[: WIDTH - 4].rstrip() + " ..."


def _verdict(certificate: Statement) -> Iterator[str]:
    modules = sum(not o.auxiliary for o in certificate.owners)
    yield f"Certificate of locality: {certificate.method}, {modules} module{'s' * (modules != 1)}"
    unfinished = [f"the {c.name} is {c.status}" for c in certificate.checks if c.status != "held"]
    if unfinished:
        yield from _short(f"  NOT PROVED: {', '.join(unfinished)}")
    reasons = certificate.reasons
    count = f" ({len(reasons)} reasons)" if len(reasons) > 1 else ""
    yield from _short(f"  {certificate.verdict}{count}" + (f": {reasons[0]}" if reasons else ""))


def _checks(certificate: Statement) -> Iterator[str]:
    held = [c for c in certificate.checks if c.status == "held"]
    took = "" if certificate.seconds is None else f" in {certificate.seconds:.2f} s"
    names = ", ".join(c.name for c in held)
    yield _line("checks", f"{len(held)} of {len(certificate.checks)} held{took}: {names}")
    yield from (_line("ran on", c.detail) for c in certificate.checks if "target: " in c.detail)


def _program(certificate: Statement) -> Iterator[str]:
    table = certificate.table
    yield _line("loss", certificate.loss)
    yield _line("trains with", certificate.training or "optimizers that nobody has named")
    if certificate.phases:
        yield _line("phases", "; ".join(certificate.phases))
    yield _line(
        "needs",
        f"auxiliary model: {_yes(table.auxiliary_model)}; whole forward pass: {_yes(table.forward_pass)}; "
        f"backward pass: {table.backward_pass}",
    )
    yield _line("pipeline-exact", f"{_yes(certificate.pipeline_exact)}: {certificate.pipeline_reason}")
    path = certificate.critical_path
    ends = f"{path[0]} > ... > {path[-1]}" if len(path) > 2 else " > ".join(path)
    yield _line("critical path", f"{len(path)} module-steps: {ends}")
    if certificate.gradients:
        ways = {_way(how) for _, how in certificate.gradients}
        yield _line("gradients", f"{len(certificate.gradients)} taken as values: {'; '.join(sorted(ways))}")
    memory = certificate.memory
    if memory is None:
        yield _line("memory", "no estimate")
        return
    peak = f"peak {size(memory.peak)} in '{memory.at}' at a batch of {memory.batch}"
    yield _line(
        "memory", f"{peak}; parameters {size(memory.parameters)}; optimizers {size(memory.optimizer)}"
    )


def _way(how: str) -> str:
    """Return how a gradient passes, without the name of the module that it passes through."""
    before, quote, rest = how.partition(" of '")
    return before + rest.rpartition("'")[2] if quote else how


# ---- modules, those of a kind together


def _modules(certificate: Statement, room: int) -> list[str]:
    kinds: dict[Any, list[OwnerFacts]] = {}
    for owner in certificate.owners:
        kinds.setdefault(_kind(certificate, owner), []).append(owner)
    lines = [_group(certificate, owners) for owners in kinds.values()]
    if len(lines) <= room:
        return lines
    rest = list(kinds.values())[room - 1 :]
    count = sum(map(len, rest))
    return [*lines[: room - 1], _line("", f"and {count} more, of {len(rest)} further kinds")]


def _kind(certificate: Statement, owner: OwnerFacts) -> tuple[Any, ...]:
    """Return what the summary says of an owner beside its name and size."""
    proved = {o.proved_by for o in owner.objectives}
    return (
        owner.auxiliary,
        _objectives(owner),
        frozenset(proved),
        _entering(certificate, owner),
        _waits(owner),
    )


def _group(certificate: Statement, owners: Sequence[OwnerFacts]) -> str:
    owner, many = owners[0], len(owners) > 1
    seen = min((len(o.proved_by) for each in owners for o in each.objectives), default=3)
    doubt = f" (seen by {seen} of 3 checks)" if seen < 3 else ""
    text = f"{sum(o.count for o in owners):,} parameters; {_objectives(owner)}{doubt}"
    text += f" on {_entering(certificate, owner)}; {_waits(owner)}"
    count = f" ({len(owners)})" if len(owners) > 2 else ""
    between = " ... " if len(owners) > 2 else ", "
    room = WIDTH - len(_line("", f"{between * many}{count}: {text}"))
    ends = [_cut(o.name, max(room // (1 + many), 8)) for o in ([owner, owners[-1]] if many else [owner])]
    label = ("auxiliaries" if many else "auxiliary") if owner.auxiliary else "modules" if many else "module"
    return _line(label, f"{between.join(ends)}{count}: {text}")


def _cut(name: str, room: int) -> str:
    """Return a name, without its middle where it is too long."""
    half = room // 2 - 1
    return name if len(name) <= room else f"{name[:half]}..{name[-half:]}"


def _objectives(owner: OwnerFacts) -> str:
    named = " and ".join(o.name.removeprefix(f"{owner.name}.") for o in owner.objectives)
    return f"frozen; {named}".removesuffix("; ") if owner.frozen else named or "no objective"


def _entering(certificate: Statement, owner: OwnerFacts) -> str:
    found = dict.fromkeys(_flow(flow) for flow in certificate.entering(owner.name))
    return ", ".join(found) or "nothing"


def _flow(flow: Flow) -> str:
    place = {"up": " below", "down": " above"}.get(flow.direction, "") if flow.producer != "data" else ""
    return f"{flow.kind}{place}{' (earlier steps)' * (flow.staleness > 0)}"


def _waits(owner: OwnerFacts) -> str:
    waits = "backward above" if owner.backward_locked else "forward above" if owner.update_locked else "none"
    late = any(o not in owner.update_waits_for for o in owner.depends_on)
    return f"waits: {waits}" + ", uses earlier steps" * late


# ---- what must be said


def _said(label: str, items: list[str]) -> list[str]:
    """Return one or two lines."""
    if len(items) == 1:
        return _short(f"  {label:<{_LABEL}} {items[0]}")
    second = items[1:] if len(items) < 3 else [f"and {len(items) - 1} more"]
    return [_line(label if i == 0 else "", text) for i, text in enumerate([*items[:1], *second] or ["none"])]


def _short(line: str) -> list[str]:
    """Return at most two lines; what does not fit is cut, visibly."""
    lines = wrapped(line)
    if len(lines) > 2:
        lines = [lines[0], lines[1][: WIDTH - 4].rstrip() + " ..."]
    return lines


def _yes(value: bool) -> str:
    return "yes" if value else "no"
