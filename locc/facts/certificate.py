"""What was proved of a program, as data and as text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locc.errors import LoccError
from locc.facts.page import page
from locc.facts.records import CheckRun, Memory, ObjectiveFacts, OwnerFacts, TableRow
from locc.facts.statement import VERSION, Statement
from locc.facts.summary import summary
from locc.facts.traffic import Flow
from locc.ir import Coupling, TrainingGraph
from locc.ir.captured import strip


@dataclass(frozen=True)
class Certificate(Statement):
    """What was proved of a program, and what follows from its graph.

    Everything in it is derived from the training graph and from what the checks saw; the method's
    name is a title, `training` (the optimizers and where they come from) a remark, and neither is proved.
    """

    def __str__(self) -> str:
        return self.text()

    def text(self, verbose: bool = False) -> str:
        """Return the certificate as text, at most 120 columns wide.

        Twenty lines, whatever the number of modules: what repeats is folded, with its count. `verbose` gives
        a page with a block for each module instead.
        """
        return "\n".join(page(self) if verbose else summary(self)) + "\n"

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
    """Return a hash of the training graph: of `graph_text`."""
    return hashlib.sha256(graph_text(ir).encode()).hexdigest()


def graph_text(ir: TrainingGraph) -> str:
    """Return the training graph's text, the functions and modules in it, and its tensors' shapes."""
    lines = []
    functions = [_qualified(n.target) for n in ir.graph.nodes if n.op == "call_function"]
    for text in (str(ir), repr(ir.root), *functions):
        # An object's address is not part of the program.
        lines.append(re.sub(r" at 0x[0-9a-f]+", "", text))
    for path, tensor in sorted({**dict(ir.root.named_parameters()), **dict(ir.root.named_buffers())}.items()):
        lines.append(f"{strip(path)} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}")
    return "".join(f"{line}\n" for line in lines)


def _qualified(function: Any) -> str:
    """Return a function's module and qualified name: the graph's text has its bare name alone."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"
