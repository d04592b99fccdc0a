"""Who owns which tensor of the program, under the user's own path."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from locc.ir.captured import owned_tensor, strip
from locc.ir.graph import TrainingGraph
from locc.ir.view import node_parameters


@dataclass(frozen=True)
class Owned:
    """A parameter or buffer with its user-facing path and the owners whose nodes use it."""

    path: str
    tensor: Tensor
    owners: tuple[str, ...]


@dataclass(frozen=True)
class Names:
    """Every parameter and buffer of a program, by id."""

    parameters: dict[int, Owned]
    buffers: dict[int, Owned]

    @classmethod
    def of(cls, ir: TrainingGraph) -> Names:
        """Read the ownership from the nodes of the graph."""
        users = _users(ir)
        parameters = {
            id(p): Owned(strip(path), p, tuple(users.get(id(p), ())))
            for path, p in ir.root.named_parameters()
        }
        for node in ir.graph.nodes:  # a node may read a parameter that no module has registered
            for path, p in node_parameters(ir.root, node):
                parameters.setdefault(id(p), Owned(strip(path), p, tuple(users.get(id(p), ()))))
        buffers = {
            id(b): Owned(strip(path), b, tuple(users.get(id(b), ()))) for path, b in ir.root.named_buffers()
        }
        return cls(parameters, buffers)

    def home(self, tensor: Tensor) -> str:
        """Return a clause that says which module owns a parameter or buffer."""
        found = self.parameters.get(id(tensor)) or self.buffers.get(id(tensor))
        return home(found.owners if found is not None else ())


def home(owners: tuple[str, ...]) -> str:
    """Return a clause that says which modules own a tensor."""
    if not owners:
        return "which no module of the program owns"
    if len(owners) == 1:
        return f"which module '{owners[0]}' owns"
    return "which modules " + ", ".join(f"'{o}'" for o in owners) + " use"


def some(names: list[str]) -> str:
    """Return the first few names, quoted, and how many more there are."""
    shown = ", ".join(f"'{n}'" for n in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _users(ir: TrainingGraph) -> dict[int, dict[str, None]]:
    users: dict[int, dict[str, None]] = {}
    for node in ir.graph.nodes:
        owner = str(node.meta.get("owner"))
        for _, parameter in node_parameters(ir.root, node):
            users.setdefault(id(parameter), {})[owner] = None
        for buffer in node_buffers(ir, node):
            users.setdefault(id(buffer), {})[owner] = None
    return users


def node_buffers(ir: TrainingGraph, node: fx.Node) -> list[Tensor]:
    """Return the buffers that running a node may read or change."""
    if node.op not in ("call_module", "get_attr"):
        return []
    held = owned_tensor(ir.root, str(node.target))
    if isinstance(held, nn.Module):
        return list(held.buffers())
    return [held] if isinstance(held, Tensor) and not isinstance(held, nn.Parameter) else []


def spell_node(node: fx.Node) -> str:
    """Return a node's name with the line of the user's code, where it is known."""
    line = node.meta.get("line")
    where = f" ({line})" if line else ""
    owner = node.meta.get("owner")
    return f"{node.name} of '{owner}'{where}" if owner else f"{node.name}{where}"
