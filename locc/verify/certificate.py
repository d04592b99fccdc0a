"""What was proved of a program, as data and as a page of text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locc.errors import LoccError
from locc.ir import Coupling, TrainingGraph
from locc.ir.captured import strip
from locc.verify.facts import Flow
from locc.verify.memory import Memory

VERSION = 2


@dataclass(frozen=True)
class CheckRun:
    """One check: whether it held, how long it took, and on what it ran.

    `status` is "held"; "partial", where a sum over the outputs stood in for the loss; or "incomplete". A
    check that fails raises `LocalityError` instead.
    """

    name: str
    status: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class ObjectiveFacts:
    """A local objective, the parameters that it reaches, and the checks that saw no others."""

    name: str
    reaches: tuple[str, ...]
    proved_by: tuple[str, ...]


@dataclass(frozen=True)
class OwnerFacts:
    """What is known of one module, or of an auxiliary that trains alone.

    Attributes:
        name: the owner.
        index: its position in forward order (an auxiliary has that of the module it serves).
        auxiliary: whether it is an auxiliary that trains alone.
        parameters: paths of the parameters that it owns.
        count: number of their elements.
        networks: auxiliary networks that it runs.
        objectives: its local objectives.
        forward_locked: it needs values that earlier modules compute from the batch.
        update_waits_for: later modules whose forward its update waits for (empty: not update-locked).
        backward_waits_for: later modules whose backward pass its update waits for (empty: not
            backward-locked).
        backward_depth: the longest chain of such backward passes.
        trains_on_gradient: the gradient that came through a later module's layers and in which its
            objective is linear, or None.
        gradient_hops: how many modules' layers that gradient crossed.
        peak_memory: bytes of activations and gradients that are alive at most while its code runs, those
            of other owners included; None where no estimate could be made.
    """

    name: str
    index: int
    auxiliary: bool
    parameters: tuple[str, ...]
    count: int
    networks: tuple[str, ...]
    objectives: tuple[ObjectiveFacts, ...]
    forward_locked: bool
    update_waits_for: tuple[str, ...]
    backward_waits_for: tuple[str, ...]
    backward_depth: int
    trains_on_gradient: str | None
    gradient_hops: int
    peak_memory: int | None

    @property
    def update_locked(self) -> bool:
        """Whether its update waits for a later module's forward."""
        return bool(self.update_waits_for)

    @property
    def backward_locked(self) -> bool:
        """Whether its update waits for a later module's backward pass."""
        return bool(self.backward_waits_for)


@dataclass(frozen=True)
class TableRow:
    """The columns of the survey's Table I (Duan & Principe 2022), read off the graph.

    `backward_pass` is "none", "n hop(s)" where gradients cross n modules in a row without training a
    module by the chain rule, or "end to end" where they do.
    """

    auxiliary_model: bool
    forward_pass: bool
    backward_pass: str


@dataclass(frozen=True)
class Certificate:
    """What was proved of a program, and what follows from its graph.

    Everything in it is derived from the training graph and from what the checks saw; the method's
    name is a title and nothing else.
    """

    method: str
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
    def seconds(self) -> float:
        """What the checks took together."""
        return sum(check.seconds for check in self.checks)

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
        from locc.verify.page import render

        return render(self)

    def to_json(self) -> str:
        """Return the certificate as JSON; `version` tells the format, `graph_hash` the program."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

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
