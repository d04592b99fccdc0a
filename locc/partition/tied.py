"""Parameters that two modules use."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from locc.errors import SplitError
from locc.ir.captured import Root, strip
from locc.ir.coupling import Coupling
from locc.ir.view import node_parameters


@dataclass
class TiedPolicy:
    """What to do with a parameter that two modules use; `copies` lists what "copy" has taken apart.

    - "error": refuse.
    - "owner": the first module that uses it trains it; the others read its current value.
    - "copy": each other module trains a copy of its own, which replaces it in the model.
    - "auto": what suits the method, `usual`; unlike a copy that was asked for, it tells of the other ways.
    """

    policy: str
    usual: str = "copy"
    copies: list[Coupling] = field(default_factory=list)
    _undo: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy not in ("auto", "error", "owner", "copy"):
            raise SplitError(f"tied={self.policy!r}: choose 'auto', 'owner', 'copy' or 'error'")

    @property
    def _chosen(self) -> str:
        return self.usual if self.policy == "auto" else self.policy

    @property
    def notes(self) -> list[str]:
        """What was done to the model without having been asked for."""
        return [str(copied) for copied in self.copies] if self.policy == "auto" else []

    def decide(
        self, root: Root, graph: fx.Graph, indices: dict[fx.Node, int], names: Sequence[str]
    ) -> dict[int, int]:
        """Return, for each parameter that stays tied, its id and the index of the module that owns it."""
        users: dict[int, dict[int, list[tuple[fx.Node, str]]]] = {}
        held: dict[int, nn.Parameter] = {}
        for node, path, parameter in self._uses(root, graph):
            for index in self._readers(node, indices):
                users.setdefault(id(parameter), {}).setdefault(index, []).append((node, path))
                held[id(parameter)] = parameter
        tied = {key: found for key, found in users.items() if len(found) > 1 and held[key].requires_grad}
        if tied and self._chosen == "error":
            raise SplitError(self._refusal(next(iter(tied.values())), names))
        if self._chosen == "copy":
            for key, found in tied.items():
                self._copy(root, held[key], found, names)
            return {}
        return {key: min(found) for key, found in tied.items()}

    @staticmethod
    def _uses(root: Root, graph: fx.Graph) -> list[tuple[fx.Node, str, nn.Parameter]]:
        return [(n, path, p) for n in graph.nodes for path, p in node_parameters(root, n)]

    @staticmethod
    def _readers(node: fx.Node, indices: dict[fx.Node, int]) -> set[int]:
        if node.op == "get_attr":
            return {indices[u] for u in node.users if u in indices}
        return {indices[node]} if node in indices else set()

    @staticmethod
    def _refusal(found: dict[int, list[tuple[fx.Node, str]]], names: Sequence[str]) -> str:
        places = [f"'{strip(uses[0][1])}' in module '{names[k]}'" for k, uses in sorted(found.items())]
        return (
            f"one parameter is used by several modules: {', '.join(places)}; pass tied='copy' (each trains "
            "its own) or tied='owner' (the first trains it), or choose splits that keep them together"
        )

    def _copy(
        self,
        root: Root,
        parameter: nn.Parameter,
        found: dict[int, list[tuple[fx.Node, str]]],
        names: Sequence[str],
    ) -> None:
        slots = [
            (module, name)
            for module in root.modules()
            for name, p in module._parameters.items()
            if p is parameter
        ]
        first, *others = sorted(found)
        for index in others:
            path = strip(found[index][0][1])
            one, other = names[first], names[index]
            text = f"'{other}' trains a copy of parameter '{path}', which it shared with '{one}'"
            if self.policy == "auto":
                text += "; tied='owner' would keep it one, which the first trains"
            self.copies.append(Coupling(path, (one, other), text, live=False))
            fresh = nn.Parameter(copy.deepcopy(parameter.data), parameter.requires_grad)
            for node, _ in found[index]:
                mine = [(m, n) for m, n in slots if self._under(root, m, str(node.target), node.op)]
                theirs = {
                    id(m)
                    for k, uses in found.items()
                    if k != index
                    for n, _ in uses
                    for m in self._at(root, n)
                }
                if not mine or any(id(m) in theirs for m, _ in mine):
                    raise SplitError(
                        f"'{strip(found[index][0][1])}' cannot be copied for module '{names[index]}', as "
                        f"tied='{self.policy}' asks: the same submodule runs in several modules; use "
                        "tied='owner' (the first trains it, the others use it), or give the model two "
                        "submodules, or choose splits that keep its calls together"
                    )
                for module, name in mine:
                    if module._parameters[name] is not fresh:
                        self._undo.append((module, name, parameter))
                        setattr(module, name, fresh)

    @staticmethod
    def _at(root: Root, node: fx.Node) -> list[nn.Module]:
        target: Any = root
        path = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
        target = root.get_submodule(path)
        return list(target.modules()) if node.op == "call_module" else [target]

    @classmethod
    def _under(cls, root: Root, module: nn.Module, path: str, op: str) -> bool:
        base = root.get_submodule(path if op == "call_module" else path.rpartition(".")[0])
        return any(m is module for m in (base.modules() if op == "call_module" else [base]))

    def undo(self) -> None:
        """Put the tied parameters back, when compilation fails after all."""
        for module, name, parameter in reversed(self._undo):
            setattr(module, name, parameter)
        self._undo.clear()
        self.copies.clear()
