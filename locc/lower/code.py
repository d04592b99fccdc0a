"""Straight-line code: nodes of one owner as one Python function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from locc.ir import ops
from locc.ir.graph import TrainingGraph
from locc.ir.printer import statement
from locc.ir.view import draws, stream_of
from locc.lower.tasks import Analysis


def is_lent(state: fx.Node, user: fx.Node) -> bool:
    """Whether a read of a parameter or state is used by another owner than its own."""
    return bool(state.op == "get_attr" and state.meta["owner"] != user.meta["owner"])


def compile_nodes(
    nodes: list[fx.Node], ir: TrainingGraph, found: Analysis
) -> tuple[Callable[..., tuple[Any, ...]], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Compile nodes to one Python function; returns function, its text, names read and names written."""
    graph = fx.Graph()
    streams = graph.placeholder("streams_")
    copies: dict[fx.Node, fx.Node] = {}
    inside = set(nodes)
    reads = list(
        dict.fromkeys(
            source
            for node in nodes
            for source in node.all_input_nodes
            if source not in inside and (source.op != "get_attr" or is_lent(source, node))
        )
    )
    for source in reads:
        copies[source] = graph.placeholder(source.name)
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = graph.get_attr(str(source.target))
        if draws(ir.root, node):
            graph.call_function(start, (streams, stream_of(node)))
        copies[node] = _copy(graph, node, copies, node in found.leaves)
    kept = [n for n in nodes if n in found.watched or _used_outside(n, inside, ir, found.needed)]
    graph.output(tuple(copies[n] for n in kept))
    source_code = graph.python_code("self")
    space: dict[str, Any] = dict(source_code.globals)
    exec(compile(source_code.src, f"<locc {nodes[0].meta['owner']}>", "exec"), space)
    function = partial(space["forward"], ir.root)
    own = [s for s in copies if s.op == "get_attr" and s not in inside and s not in reads]
    text = tuple(statement(n, own) for n in nodes)
    return function, text, tuple(n.name for n in reads), tuple(n.name for n in kept)


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], is_leaf: bool) -> fx.Node:
    made = graph.node_copy(node, lambda n: copies[n])
    if not is_leaf:
        return made
    if node.target is ops.stop_gradient:
        made.target = leaf
        return made
    return graph.call_function(tracked, (made,))


def start(streams: Callable[[str], None], node: str) -> None:
    """Start the random stream of a node that draws: the same whatever runs before it."""
    streams(node)


def leaf(x: torch.Tensor) -> torch.Tensor:
    """Return `x` without its tape, as a leaf that a gradient will be taken with respect to."""
    return x.detach().requires_grad_(True)


def tracked(x: torch.Tensor) -> torch.Tensor:
    """Return `x` so that a gradient can be taken with respect to it: a leaf, where it has no tape.

    A leaf that it may be (a module's parameter) has gradients of its own, which are none of the value's.
    """
    if not x.requires_grad:
        return leaf(x)
    return x.view_as(x) if x.is_leaf else x


def _used_outside(node: fx.Node, inside: set[fx.Node], ir: TrainingGraph, needed: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return True
    carried = any(end is node for region in ir.repeats.values() for _, end in region.carried)
    return carried or node is ir.loss or any(u in needed and u not in inside for u in node.users)
