"""Through which nodes a gradient can flow: the one walk that partition, methods and lowering share.

The proof in `locc.proof` has a walk of its own, so that a mistake here does not hide itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from locc.ir import ops
from locc.ir.spec import TensorSpec


def changers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node whose storage is changed in place, the nodes that change it."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for changed in node.meta.get("mutates", ()):
            found.setdefault(changed, []).append(node)
    return found


def tape_of(scalar: fx.Node, changed: Mapping[fx.Node, list[fx.Node]] | None = None) -> set[fx.Node]:
    """Return the nodes through which a gradient of `scalar` can flow, `scalar` and the leaves included.

    It ends where a round begins, and at whole numbers and truth values. An in-place change is part of the
    tape of what it changes, though no edge leads there: `changed`, as `changers` returns it (found anew where
    it is not given).
    """
    changed = changers(scalar.graph) if changed is None else changed
    seen: set[fx.Node] = set()
    todo = [scalar]
    while todo:
        node = todo.pop()
        if node in seen or node.target is ops.gradient:
            continue
        seen.add(node)
        spec = node.meta.get("spec")
        discrete = isinstance(spec, TensorSpec) and not spec.differentiable
        if node.target not in (ops.stop_gradient, ops.carry) and not discrete:
            todo.extend(node.all_input_nodes)
            todo.extend(changed.get(node, ()))
    return seen
