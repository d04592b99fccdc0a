"""What was proved of a program, as data and as a page of text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import filesize

from locc.errors import LoccError
from locc.facts.records import CheckRun, Memory, ObjectiveFacts, OwnerFacts, TableRow
from locc.facts.traffic import Flow
from locc.ir import Coupling, TrainingGraph
from locc.ir.captured import strip

VERSION = 5


@dataclass(frozen=True)
class Certificate:
    """What was proved of a program, and what follows from its graph.

    Everything in it is derived from the training graph and from what the checks saw; the method's
    name is a title, `training` (the optimizers and where they come from) a remark, and neither is proved.
    """

    method: str
    training: str
    verdict: str
    reasons: tuple[str, ...]
    owners: tuple[OwnerFacts, ...]
    flows: tuple[Flow, ...]
    pipeline_exact: bool
    pipeline_reason: str
    critical_path: tuple[str, ...]
    table: TableRow
    gradients: tuple[tuple[str, str], ...]
    couplings: tuple[Coupling, ...]
    warnings: tuple[str, ...]
    checks: tuple[CheckRun, ...]
    memory: Memory | None
    graph_hash: str
    version: int = VERSION

    @property
    def complete(self) -> bool:
        """Whether every check ran to its end."""
        return all(check.status == "held" for check in self.checks)

    @property
    def seconds(self) -> float | None:
        """What the checks took together; None for a certificate that was read from a file."""
        taken = [check.seconds for check in self.checks if check.seconds is not None]
        return sum(taken) if taken else None

    def owner(self, name: str) -> OwnerFacts:
        """Return the facts on one owner.

        Raises:
            LoccError: there is no such owner.
        """
        for owner in self.owners:
            if owner.name == name:
                return owner
        raise LoccError(
            f"the certificate knows no module '{name}'; it has " + ", ".join(o.name for o in self.owners)
        )

    def entering(self, name: str) -> tuple[Flow, ...]:
        """Return what enters an owner."""
        return tuple(f for f in self.flows if f.consumer == name)

    def leaving(self, name: str) -> tuple[Flow, ...]:
        """Return what leaves an owner."""
        return tuple(f for f in self.flows if f.producer == name)

    def __str__(self) -> str:
        return "\n".join(_page(self)) + "\n"

    def to_json(self) -> str:
        """Return the certificate as JSON; `version` tells the format, `graph_hash` the program.

        What differs from run to run (how long a check took) is left out: while the program is unchanged, so
        is the text, byte for byte.
        """
        data = dataclasses.asdict(self)
        for check in data["checks"]:
            del check["seconds"]
        return json.dumps(data, indent=2, sort_keys=True)

    def save(self, path: str | Path) -> Path:
        """Write the JSON to a file and return its path."""
        path = Path(path)
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read a certificate back.

        Raises:
            LoccError: the text is no certificate, or one of a newer version.
        """
        try:
            data = json.loads(text)
            version = data["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise LoccError(
                "this is no certificate: expected the JSON that Certificate.save writes"
            ) from error
        if version != VERSION:
            raise LoccError(f"the certificate has version {version}; this locc reads version {VERSION}")
        return _read(cls, data)


def _read(cls: type[Certificate], data: dict[str, Any]) -> Certificate:
    owners = tuple(
        OwnerFacts(
            **{
                **_tuples(owner),
                "objectives": tuple(ObjectiveFacts(**_tuples(o)) for o in owner["objectives"]),
            }
        )
        for owner in data["owners"]
    )
    return cls(
        **{
            **_tuples(data),
            "owners": owners,
            "flows": tuple(Flow(**f) for f in data["flows"]),
            "couplings": tuple(Coupling(**_tuples(c)) for c in data["couplings"]),
            "table": TableRow(**data["table"]),
            "checks": tuple(CheckRun(**c) for c in data["checks"]),
            "memory": data["memory"] and _memory(data["memory"]),
            "gradients": tuple((name, text) for name, text in data["gradients"]),
        }
    )


def _memory(data: dict[str, Any]) -> Memory:
    return Memory(**{**data, "owners": tuple((name, size) for name, size in data["owners"])})


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def graph_hash(ir: TrainingGraph) -> str:
    """Return a hash of the training graph: its text, the functions and modules in it, its tensors' shapes."""
    digest = hashlib.sha256()
    functions = [_qualified(n.target) for n in ir.graph.nodes if n.op == "call_function"]
    for text in (str(ir), repr(ir.root), *functions):
        # An object's address is not part of the program.
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", text).encode() + b"\n")
    for path, tensor in sorted({**dict(ir.root.named_parameters()), **dict(ir.root.named_buffers())}.items()):
        digest.update(f"{strip(path)} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}\n".encode())
    return digest.hexdigest()


def _qualified(function: Any) -> str:
    """Return a function's module and qualified name: the graph's text has its bare name alone."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


# ---- as text


def _page(certificate: Certificate) -> list[str]:
    """Return the page: verdict, checks, the program's properties, then one block for each owner."""
    lines = [*_title(certificate), "", *_checks(certificate), "", *_program(certificate)]
    for owner in certificate.owners:
        lines += ["", *_owner(certificate, owner)]
    for heading, items in (("couplings", certificate.couplings), ("warnings", certificate.warnings)):
        lines += ["", heading, *([f"  {item}" for item in items] or ["  none"])]
    return lines


def _title(certificate: Certificate) -> Iterator[str]:
    modules = sum(not o.auxiliary for o in certificate.owners)
    yield f"Certificate of locality: {certificate.method}, {modules} modules"
    yield f"  {certificate.verdict}"
    for reason in certificate.reasons[:8]:
        yield f"    {reason}"
    if len(certificate.reasons) > 8:
        yield f"    and {len(certificate.reasons) - 8} more reasons"


def _checks(certificate: Certificate) -> Iterator[str]:
    total = certificate.seconds
    yield "checks" if total is None else f"checks ({total:.2f} s)"
    for check in certificate.checks:
        took = "" if check.seconds is None else f"{check.seconds:6.3f} s  "
        yield f"  {check.name:<24} {check.status:<10} {took}{check.detail}"


def _program(certificate: Certificate) -> Iterator[str]:
    table = certificate.table
    yield "program"
    yield f"  trains with               {certificate.training or 'optimizers that nobody has named'}"
    yield f"  auxiliary model needed    {_yes(table.auxiliary_model)}"
    yield f"  whole forward pass needed {_yes(table.forward_pass)}"
    yield f"  backward pass needed      {table.backward_pass}"
    yield f"  pipeline-exact            {_yes(certificate.pipeline_exact)}: {certificate.pipeline_reason}"
    path = list(_folded(certificate.critical_path))
    shown = " > ".join(path if len(path) <= 12 else [*path[:6], "...", *path[-5:]])
    yield f"  critical path             {len(certificate.critical_path)} module-steps: {shown}"
    for name, how in certificate.gradients[:12]:
        yield f"  gradient value            {name}: {how}"
    if len(certificate.gradients) > 12:
        yield f"  gradient value            and {len(certificate.gradients) - 12} more"
    yield f"  memory estimate           {_memory_line(certificate)}"
    yield f"  graph                     sha256 {certificate.graph_hash}"


def _memory_line(certificate: Certificate) -> str:
    memory = certificate.memory
    if memory is None:
        return "none"
    return (
        f"peak {_size(memory.peak)} of activations and gradients at a batch of {memory.batch}, in "
        f"'{memory.at}'; parameters {_size(memory.parameters)}, optimizers {_size(memory.optimizer)}"
    )


def _size(count: int) -> str:
    return filesize.decimal(count)


def _folded(steps: Iterable[str]) -> Iterator[str]:
    last, count = "", 0
    for step in [*steps, ""]:
        if step != last:
            if last:
                yield last if count == 1 else f"{last} x{count}"
            last, count = step, 0
        count += 1


def _owner(certificate: Certificate, owner: OwnerFacts) -> Iterator[str]:
    kind = f"auxiliary of module {owner.index}" if owner.auxiliary else f"module {owner.index}"
    yield f"{kind}: {owner.name}"
    yield (
        f"  owns      {_count(len(owner.parameters), 'parameter tensor')}, {owner.count:,} elements: "
        + _listed(owner.parameters)
    )
    if owner.networks:
        yield f"  runs      auxiliary networks {', '.join(owner.networks)}"
    for objective in owner.objectives:
        reach = _count(len(objective.reaches), "parameter tensor")
        yield f"  objective {objective.name} reaches {reach} of its own, none else"
        yield f"            by {', '.join(objective.proved_by)}"
    if not owner.objectives:
        yield "  objective none"
    for word, flows, end in (
        ("enters", certificate.entering(owner.name), "producer"),
        ("leaves", certificate.leaving(owner.name), "consumer"),
    ):
        for text in _flows(flows, end):
            yield f"  {word}    {text}"
    yield f"  locking   {_locking(owner)}"
    if owner.peak_memory is not None:
        yield f"  memory    {_size(owner.peak_memory)} at most while its code runs"


def _flows(flows: tuple[Flow, ...], end: str) -> Iterator[str]:
    preposition = "from" if end == "producer" else "to"
    for flow in flows[:10]:
        other = flow.producer if end == "producer" else flow.consumer
        hops = f", through {_count(flow.hops, 'module')}" if flow.hops else ""
        spec = f" {flow.spec}" if flow.spec else ""
        way = f" ({flow.direction})" if other != "data" else ""
        late = f", {_count(flow.staleness, 'step')} old" if flow.staleness else ""
        yield f"{flow.kind} {flow.value}{spec} {preposition} {other}{way}{hops}{late}"
    if len(flows) > 10:
        yield f"and {len(flows) - 10} more"


def _locking(owner: OwnerFacts) -> str:
    backward = "no"
    if owner.backward_locked:
        backward = f"yes, waits for {_listed(owner.backward_waits_for, 4)}"
        backward += f" (a chain of {owner.backward_depth})" if owner.backward_depth > 1 else " (one hop)"
    update = f"yes, waits for {_listed(owner.update_waits_for, 4)}" if owner.update_locked else "no"
    earlier = [o for o in owner.depends_on if o not in owner.update_waits_for]
    late = f"; trains on values of earlier steps of {_listed(earlier, 4)}" if earlier else ""
    return f"forward: {_yes(owner.forward_locked)}; update: {update}; backward: {backward}{late}"


def _listed(items: Iterable[str], most: int = 6) -> str:
    names = list(items)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "none"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
