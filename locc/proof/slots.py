"""The places where modules keep tensors, and what was put there in the meantime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from locc.ir.captured import owned_tensor, strip
from locc.ir.graph import TrainingGraph

_KINDS = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "submodule"}


@dataclass(frozen=True)
class Place:
    """A parameter, buffer, submodule or tensor attribute of a module; `owners` run the module."""

    kind: str
    path: str
    owners: tuple[str, ...]


class Slots:
    """Watches by identity what the modules of a program hold."""

    def __init__(self, ir: TrainingGraph) -> None:
        owners = _owners(ir)
        self._tables: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = []
        for path, module in ir.root.named_modules():
            runs = tuple(owners.get(id(module), ()))
            self._tables.append(("attribute", path, runs, module.__dict__))
            self._tables += [
                (kind, path, runs, table)
                for name, kind in _KINDS.items()
                if (table := module.__dict__.get(name))  # an empty table is not watched
            ]
        self._seen = [dict(table) for *_, table in self._tables]
        self._few = [i for i, (kind, *_) in enumerate(self._tables) if kind in ("parameter", "buffer")]

    def attributes(self) -> Iterator[tuple[Place, Tensor]]:
        """Yield the tensors that modules hold as plain attributes."""
        for kind, path, owners, table in self._tables:
            if kind == "attribute":
                for name, value in table.items():
                    if comparable(value):
                        yield _place(kind, path, name, owners), value

    def changes(self, everywhere: bool) -> Iterator[tuple[Place, Any, Any]]:
        """Yield each place that holds something else since the last look: what it held, and holds.

        Parameters and buffers are always looked at; attributes and submodules, which are many, only if
        `everywhere`.
        """
        for i in range(len(self._tables)) if everywhere else self._few:
            kind, path, owners, table = self._tables[i]
            seen = self._seen[i]
            if len(table) == len(seen) and all(map(is_, table.values(), seen.values())):
                continue
            self._seen[i] = dict(table)
            for name in {**seen, **table}:
                old, new = seen.get(name), table.get(name)
                watched = kind != "attribute" or name == "training" or _any_tensor(old, new)
                if old is not new and watched:
                    yield _place(kind, path, name, owners), old, new


def comparable(value: Any) -> bool:
    """Whether a value is an ordinary tensor, whose elements can be compared."""
    return type(value) is Tensor and value.layout is torch.strided and not value.is_meta


def _any_tensor(*values: Any) -> bool:
    return any(isinstance(v, Tensor) for v in values)


def _place(kind: str, path: str, name: str, owners: tuple[str, ...]) -> Place:
    return Place(kind, strip(f"{path}.{name}"), owners)


def _owners(ir: TrainingGraph) -> dict[int, dict[str, None]]:
    """Return the owners whose nodes run each module, by the module's id."""
    found: dict[int, dict[str, None]] = {}
    for node in ir.graph.nodes:
        held = owned_tensor(ir.root, str(node.target)) if node.op in ("call_module", "get_attr") else None
        for module in held.modules() if isinstance(held, nn.Module) else ():
            found.setdefault(id(module), {})[str(node.meta.get("owner"))] = None
    return found
