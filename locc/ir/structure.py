"""Whether two graphs compute the same thing, node by node.

Looks through what never changes a value: `stop_gradient`, split markers and the copy that a consumer
makes of a boundary value. What training reads in the place of a value (`TrainingGraph.feed`) counts as that
value, its `meta["feeds"]`. A node that a pass put in the place of another (a feedback layer for a linear
layer) says so in `meta["stands_for"]`, the (op, target) of the node it replaces; its first argument is then
that node's argument, or the tuple of them, and its keywords are that node's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import fx

from locc.ir import ops
from locc.markers import split


def fingerprint(results: Sequence[Any]) -> tuple[Hashable, ...]:
    """Return a value that is equal for two lists of results exactly if they are computed alike."""
    known: dict[Hashable, int] = {}
    return tuple(_key(result, {}, known) for result in results) + tuple(known)


def _key(value: Any, seen: dict[fx.Node, Hashable], known: dict[Hashable, int]) -> Hashable:
    if isinstance(value, fx.Node):
        return _node_key(value, seen, known)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, tuple(_key(v, seen, known) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((k, _key(v, seen, known)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", tuple(_key(v, seen, known) for v in (value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value))


def _node_key(start: fx.Node, seen: dict[fx.Node, Hashable], known: dict[Hashable, int]) -> Hashable:
    """Number the nodes by what they compute, inputs first; a loop, since models are deep."""
    todo = [start]
    while todo:
        node = todo[-1]
        waiting = [n for n in _inputs(node) if n not in seen]
        if waiting:
            todo.extend(waiting)
            continue
        todo.pop()
        if node not in seen:
            through = _through(node)
            seen[node] = seen[through] if through is not None else _number(node, seen, known)
    return seen[start]


def _through(node: fx.Node) -> fx.Node | None:
    """Return the node whose value this one stands for unchanged, or None."""
    if "feeds" in node.meta:
        origin: fx.Node = node.meta["feeds"]
        return origin
    if node.target in (ops.stop_gradient, split) or node.meta.get("role") == "copy":
        return node.all_input_nodes[0]
    return None


def _inputs(node: fx.Node) -> list[fx.Node]:
    through = _through(node)
    if through is not None:
        return [through]
    kept: list[fx.Node] = []
    fx.map_arg(_call_of(node)[2:], kept.append)
    return kept


def _call_of(node: fx.Node) -> tuple[str, Any, Any, Any]:
    if node.meta.get("stands_for"):
        op, target = node.meta["stands_for"]
        first = node.args[0]
        return op, target, first if isinstance(first, tuple) else (first,), node.kwargs
    if node.target is ops.call_with:
        module = node.args[0]
        assert isinstance(module, fx.Node)
        return "call_module", module.target, node.args[2], node.args[3]
    return node.op, node.target, node.args, node.kwargs


def _number(node: fx.Node, seen: dict[fx.Node, Hashable], known: dict[Hashable, int]) -> Hashable:
    op, target, args, kwargs = _call_of(node)
    key: Hashable = (op, node.target)
    if op != "placeholder":
        name = target if isinstance(target, Hashable) else repr(target)
        key = (op, name, _key(args, seen, known), _key(kwargs, seen, known))
    return ("node", known.setdefault(key, len(known)))
