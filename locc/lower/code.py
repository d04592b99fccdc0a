"""Straight-line code: nodes of one owner as one Python function."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from locc.ir import ops
from locc.ir.graph import TrainingGraph
from locc.ir.printer import statement
from locc.ir.view import draws, stream_of
from locc.lower.tasks import Analysis


def is_lent(state: fx.Node, user: fx.Node) -> bool:
    """Whether a read of a parameter or state is used by another owner than its own."""
    return bool(state.op == "get_attr" and state.meta["owner"] != user.meta["owner"])


class Taken:
    """What code takes of the root at its paths, now: attributes `m0`, `m1`, ..."""


class Code:
    """What a segment computes, written without a name of its own: modules of one structure have one text.

    Attributes:
        text: of a Python function, of what is taken of the root, what starts a random stream by its number
            in this code, and the values that are read.
        space: its globals, the function `forward` among them.
    """

    def __init__(
        self, owner: str, graph: fx.Graph, root: nn.Module, paths: tuple[str, ...], streams: tuple[str, ...]
    ) -> None:
        source = graph.python_code("self")
        self.text, self.space = source.src, dict(source.globals)
        exec(compile(source.src, f"<locc {owner}>", "exec"), self.space)
        self.forward: Callable[..., tuple[Any, ...]] = self.space["forward"]
        self._root, self._streams = root, streams
        self._places = {f"m{i}": attrgetter(path) for i, path in enumerate(paths)}

    def __call__(self, streams: Callable[[str], None], *values: Any) -> tuple[Any, ...]:
        """Run the code; `streams` starts a random stream by the name of its node."""
        return self.forward(self.taken(), lambda number: streams(self._streams[number]), *values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        """Return itself: a copy of a plan runs the same code on the same root."""
        return self

    def taken(self) -> Taken:
        """Return what the code takes of the root."""
        taken = Taken()
        for name, place in self._places.items():
            setattr(taken, name, place(self._root))
        return taken


def compile_nodes(
    nodes: list[fx.Node], ir: TrainingGraph, found: Analysis
) -> tuple[Code, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Compile nodes to one function; returns it, a line for each node, names read and names written."""
    graph = fx.Graph()
    streams = graph.placeholder("streams_")
    copies: dict[fx.Node, fx.Node] = {}
    drawn: list[str] = []
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
            graph.call_function(start, (streams, len(drawn)))
            drawn.append(stream_of(node))
        copies[node] = _copy(graph, node, copies, node in found.leaves)
    kept = [n for n in nodes if n in found.watched or _used_outside(n, inside, ir, found.needed)]
    graph.output(tuple(copies[n] for n in kept))
    function = Code(str(nodes[0].meta["owner"]), graph, ir.root, _unnamed(graph), tuple(drawn))
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


def written(owner: str, graph: fx.Graph, root: nn.Module) -> Code:
    """Return the code of a graph in which nothing draws."""
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("streams_")
    return Code(owner, graph, root, _unnamed(graph), ())


def _unnamed(graph: fx.Graph) -> tuple[str, ...]:
    """Number what has a name in a graph; returns the paths of what it takes of the root."""
    paths: dict[str, str] = {}
    for i, node in enumerate(graph.nodes):
        node.name = f"v{i}"
        if node.op == "placeholder":
            node.target = node.name
        elif node.op in ("call_module", "get_attr"):
            node.target = paths.setdefault(str(node.target), f"m{len(paths)}")
    return tuple(paths)


def start(streams: Callable[[int], None], number: int) -> None:
    """Start the random stream of a node that draws: the same whatever runs before it."""
    streams(number)


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
