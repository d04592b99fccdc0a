"""What the three mechanisms share: the form of their result, and how structured values become flat nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from locc.capture.eager import Run
from locc.capture.targets import is_access, unchanging
from locc.capture.tree import Path, Structure, flatten, spell
from locc.errors import CaptureError
from locc.ir.captured import Decision, Root, SizeGuard
from locc.ir.ops import Rebuild
from locc.ir.spec import Point

COLLECTED = (
    "where hooks inside of closed modules collect them, switch that off (Hugging Face: "
    "output_router_logits, output_hidden_states, output_attentions)"
)


class RefusalError(CaptureError):
    """A refusal that no other mechanism can lift."""


@dataclass
class Trace:
    """A candidate: one graph, and what must hold for it.

    Attributes:
        decisions: what it decided on values of the inputs.
        whole: whether gradients have to be compared at every size, and not at the first alone.
        points: where it was traced.
        looks: what each node returned where it was admitted, in the order of the nodes.
    """

    graph: fx.Graph
    guards: list[SizeGuard] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    whole: bool = True
    points: list[Point] = field(default_factory=list)
    looks: dict[Point, list[Any]] = field(default_factory=dict)


def placeholder_name(name: str) -> str:
    """Return a name for a placeholder that Python accepts."""
    clean = re.sub(r"\W+", "_", name).strip("_")
    return clean if clean.isidentifier() else f"input_{clean}"


def access(graph: fx.Graph, node: fx.Node, path: Path) -> fx.Node:
    """Return a node for the part of `node` at `path`."""
    for kind, key in path:
        function: Callable[..., Any] = getattr if kind == "attr" else operator.getitem
        node = graph.call_function(function, (node, key))
    return node


def emit_output(
    graph: fx.Graph, eager: Run, value: Any, node_of: Callable[[Any], Any]
) -> tuple[fx.Node, ...]:
    """Return the nodes of the flat output tensors, in the order of the eager run.

    Raises:
        CaptureError: the traced forward returned another structure than the eager one.
    """
    found = _match(graph, eager.structure, value, node_of, ())
    nodes = []
    for path, real, node in zip(eager.structure.paths(), eager.outputs, found, strict=True):
        if isinstance(real, Tensor):
            if node is None:
                raise CaptureError(f"output '{spell(path)}' is not computed by the traced forward")
            nodes.append(node)
    return tuple(nodes)


def _match(
    graph: fx.Graph, structure: Structure, value: Any, node_of: Callable[[Any], Any], path: Path
) -> list[Any]:
    node = node_of(value)
    if structure.branches is None:
        return [node]
    if node is not None:
        return [access(graph, node, below) for below in structure.paths()]
    leaves, other = flatten(value)
    if other != structure and other.steps != structure.steps:
        name = spell(path) or "its output"
        if len(leaves) < len(structure.paths()):
            raise CaptureError(
                f"the model returns '{name}' with {len(structure.paths())} parts, and {len(leaves)} of them "
                f"come from its open code; {COLLECTED}"
            )
        raise CaptureError(f"the traced forward returns '{name}' in another structure than eager does")
    found: list[Any] = []
    parts = _children(value, structure)
    for step, branch, part in zip(structure.steps, structure.branches, parts, strict=True):
        found += _match(graph, branch, part, node_of, (*path, step))
    return found


def _children(value: Any, structure: Structure) -> list[Any]:
    return [getattr(value, key) if kind == "attr" else value[key] for kind, key in structure.steps]


def rebuild_of(run: Run) -> Rebuild:
    """Return what puts flat output tensors back into the structure that the user's forward returned.

    Raises:
        RefusalError: the output holds an object that capture cannot see into.
    """
    holes = [isinstance(value, Tensor) for value in run.outputs]
    for path, value, hole in zip(run.structure.paths(), run.outputs, holes, strict=True):
        if not hole and not unchanging(value) and hasattr(value, "__dict__"):
            kind = type(value).__name__
            raise RefusalError(
                f"the model returns a {kind} in '{spell(path) or 'its output'}', which capture cannot see "
                f"into; {remedy(kind)}"
            )
    constants, structure = (
        [None if hole else v for v, hole in zip(run.outputs, holes, strict=True)],
        run.structure,
    )

    def build(tensors: list[Any]) -> Any:
        left = iter(tensors)
        return structure.build([next(left) if hole else c for c, hole in zip(constants, holes, strict=True)])

    kind = structure.kind.__name__ if structure.kind else "tensor"
    return Rebuild(build, f"build_{kind}")


def remedy(kind: str) -> str:
    """Return what to do about an object of a class that capture cannot see into."""
    if "Cache" in kind:
        return "switch it off (use_cache=False in the call)"
    return "use tensors, tuples, dicts or dataclasses there, or splits that leave its users in one module"


def tidy(graph: fx.Graph) -> None:
    """Erase parts and sizes that nothing uses."""
    for node in reversed(list(graph.nodes)):
        if not node.users and is_access(node):
            graph.erase_node(node)


def tensor_paths(root: Root) -> dict[int, str]:
    """Return the path under the root of every parameter, buffer and tensor attribute, by id."""
    paths: dict[int, str] = {}
    for prefix, module in root.named_modules():
        for name, value in (*module.__dict__.items(), *module._buffers.items(), *module._parameters.items()):
            if isinstance(value, Tensor):
                paths[id(value)] = f"{prefix}.{name}" if prefix else name
    # torch's own order decides under which of two names a tied tensor goes
    paths |= {id(t): name for name, t in (*root.named_parameters(), *root.named_buffers())}
    return paths


def parents_of(path: str) -> list[str]:
    """Return the paths that enclose a path, outermost first."""
    atoms = path.split(".")[:-1]
    return [".".join(atoms[: i + 1]) for i in range(len(atoms))]
