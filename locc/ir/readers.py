"""Which nodes read which memory of the root: a parameter, buffer or state, under whatever path."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from locc.ir import ops
from locc.ir.infer import infer
from locc.ir.memory import memory_of
from locc.ir.spec import TensorSpec
from locc.ir.view import node_modules, node_tensors


def touching(root: nn.Module, nodes: Iterable[fx.Node]) -> dict[int, list[tuple[fx.Node, Tensor]]]:
    """Return, for each memory of the root, the nodes that read it there, and as which tensor."""
    result: dict[int, list[tuple[fx.Node, Tensor]]] = {}
    for node in nodes:
        for _, tensor in node_tensors(root, node):
            result.setdefault(memory_of(tensor), []).append((node, tensor))
    return result


def readers(root: nn.Module, nodes: set[fx.Node]) -> dict[int, set[fx.Node]]:
    """Return, for each memory of the root, those of `nodes` whose code reads it.

    That is a call of a module that holds it, a `get_attr`, and what has that as an argument. Of a value that
    lies in the same memory (a view, a `stop_gradient` for another owner), the readers count as well.
    """
    reading: dict[fx.Node, set[fx.Node]] = {}
    result: dict[int, set[fx.Node]] = {}
    for memory, found in touching(root, nodes).items():
        for node, _ in found:
            if node not in reading:
                reading[node] = _readers(root, node) & nodes
            result.setdefault(memory, set()).update(reading[node])
    return result


def _readers(root: nn.Module, node: fx.Node) -> set[fx.Node]:
    direct = [node] if node.op == "call_module" else list(node.users)
    found = {node, *direct}
    # A module gives away what it holds (a table of positions), and not by rows of the batch.
    module = bool(node_modules(root, node))
    todo = [n for n in direct if not (module and _has_rows(n))]
    while todo:
        source = todo.pop()
        if _is_view(root, source):
            found.update(source.users)
            todo.extend(source.users)
    return found


def _is_view(root: nn.Module, node: fx.Node) -> bool:
    """Whether a value may lie in the memory of what its node reads."""
    if node.target in ops.OPS:
        return node.target is ops.stop_gradient
    if "views" not in node.meta:  # capture has not looked; what cannot be tried may
        found = infer(root, node.op, node.target, node.args, node.kwargs, {})
        node.meta["views"] = found is None or found.views
    return bool(node.meta["views"])


def _has_rows(node: fx.Node) -> bool:
    spec = node.meta.get("spec")
    return isinstance(spec, TensorSpec) and spec.batch_dim is not None
