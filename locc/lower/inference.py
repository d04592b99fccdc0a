"""The inference path cut into stages: what one module computes without waiting for another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn

from locc.ir import TrainingGraph
from locc.ir.captured import owned_tensor
from locc.ir.view import node_tensors
from locc.lower.code import written
from locc.lower.instructions import Plan, Segment, release
from locc.markers import split

JUDGED = "judged"
"""The name of what a plan of the inference path makes of the output."""


@dataclass(frozen=True)
class Stage:
    """A stretch of one module's inference: its nodes in order, what they read, and what others read."""

    owner: str
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]


def stages(ir: TrainingGraph) -> list[Stage]:
    """Cut the inference graph by owner, in an order in which every stage finds its inputs.

    A module needs one stage when no value returns to it from a later one, as in every captured forward.
    A method that folds the network (up through the encoders, down through the decoders) gives two. What
    needs no parameter is computed again by each stage that reads it; sizes always are.
    """
    needed = _needed(ir)
    again = _recomputable(ir.root, needed)
    home = _homes(needed, again)
    groups = _schedule(home)
    outputs = {unmarked(n) for n in flat_outputs(ir)}
    groups = _append(groups, ir, outputs & again)
    found = []
    bodies = [_with_recomputed(nodes, again) for _, nodes in groups]
    for k, (owner, _) in enumerate(groups):
        inside = set(bodies[k])
        reads = dict.fromkeys(
            s
            for n in bodies[k]
            for s in map(unmarked, n.all_input_nodes)
            if s not in inside and s.op != "get_attr"
        )
        crossing = [n for n in groups[k][1] if _read_later(n, k, bodies) or n in outputs]
        found.append(Stage(owner, tuple(bodies[k]), tuple(reads), tuple(crossing)))
    return [stage for stage in found if stage.writes]


def stage_graph(stage: Stage) -> fx.Graph:
    """Return a stage as a flat graph of its reads to its writes."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for source in stage.reads:
        made[source] = graph.placeholder(f"value_{len(made)}")
        made[source].meta.update(source.meta)

    def follow(node: fx.Node) -> fx.Node:
        node = unmarked(node)
        if node not in made:  # a parameter or buffer
            made[node] = graph.get_attr(str(node.target))
        return made[node]

    for node in stage.nodes:
        made[node] = graph.node_copy(node, follow)
    graph.output(tuple(made[node] for node in stage.writes))
    return graph


@dataclass(frozen=True)
class Inference:
    """The inference path as a plan, whose one result is what is made of output and target.

    Attributes:
        plan: its `loss` is that result. It has one instruction for each stage, and no tape.
        tensors: the parameters and buffers that each owner's stages read.
    """

    plan: Plan
    tensors: dict[str, list[Tensor]]


def inference(ir: TrainingGraph, judge: Callable[[Any, Any], Tensor]) -> Inference:
    """Return the inference path as a plan, cut by owner, at whose end the last module judges the output.

    Args:
        ir: the training graph.
        judge: makes a tensor of what the user's forward returns and the target.
    """
    inputs = (*(n.name for n in ir.inference.nodes if n.op == "placeholder"), ir.target.name)
    instructions: list[Any] = []
    tensors: dict[str, list[Tensor]] = {}
    for stage in stages(ir):
        reads, writes = ([n.name for n in held] for held in (stage.reads, stage.writes))
        instructions.append(
            _segment(stage.owner, written(stage.owner, stage_graph(stage), ir.root), reads, writes)
        )
        lying = (s for n in stage.nodes for s in n.all_input_nodes if s.op == "get_attr")
        every = dict.fromkeys((*stage.nodes, *lying))
        tensors.setdefault(stage.owner, []).extend(t for n in every for _, t in node_tensors(ir.root, n))
    outputs = [unmarked(o) if isinstance(o, fx.Node) else o for o in flat_outputs(ir)]
    held = [o for o in outputs if isinstance(o, fx.Node) and o.op == "get_attr"]
    tensors.setdefault(ir.last.name, []).extend(t for n in held for _, t in node_tensors(ir.root, n))
    read = list(dict.fromkeys(o for o in outputs if isinstance(o, fx.Node) and o not in held))
    rebuild = ir.captured.inference_output or ir.captured.output

    def judged(_: Any, *values: Any) -> tuple[Tensor]:
        found = dict(zip(read, values, strict=False)) | {
            n: owned_tensor(ir.root, str(n.target)) for n in held
        }
        return (
            judge(rebuild.build([found[o] if isinstance(o, fx.Node) else o for o in outputs]), values[-1]),
        )

    names = [*(n.name for n in read), ir.target.name]
    instructions.append(_segment(ir.last.name, judged, names, [JUDGED]))
    release(instructions)
    runs = tuple(dict.fromkeys(i.owner for i in instructions))
    return Inference(Plan(instructions, (), inputs, JUDGED, runs), tensors)


def _segment(owner: str, function: Callable[..., Any], reads: list[str], writes: list[str]) -> Segment:
    return Segment(owner, False, function, (), tuple(reads), tuple(writes))


def flat_outputs(ir: TrainingGraph) -> list[Any]:
    """Return what the inference graph returns, one entry for each output tensor."""
    end = next(iter(reversed(ir.inference.nodes)))
    found = end.args[0]
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _needed(ir: TrainingGraph) -> list[fx.Node]:
    """Return the computing nodes on which the outputs depend, in order, with calls made for their effect."""
    kept: set[fx.Node] = set()
    for node in reversed(list(ir.inference.nodes)):
        effect = bool(node.meta.get("mutates"))
        if node.op == "output" or effect or any(user in kept for user in node.users):
            kept.add(node)
    skipped = ("output", "placeholder", "get_attr")
    return [n for n in ir.inference.nodes if n in kept and n.op not in skipped and n.target is not split]


def unmarked(node: fx.Node) -> fx.Node:
    """Return the value that a split marker, or several, mark; any other node as it is."""
    while node.target is split:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _sources(node: fx.Node) -> list[fx.Node]:
    return [s for s in map(unmarked, node.all_input_nodes) if s.op not in ("placeholder", "get_attr")]


def _recomputable(root: nn.Module, nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes that any stage may compute for itself.

    These are sizes and other numbers read off a tensor, and what follows without parameters from the
    network's inputs and buffers alone.
    """
    changed = {
        m for n in nodes for m in (*n.meta.get("mutates", ()), *((n,) if n.meta.get("mutates") else ()))
    }
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "call_module" or node.meta.get("random") or node in changed:
            continue
        held = [owned_tensor(root, str(s.target)) for s in node.all_input_nodes if s.op == "get_attr"]
        if any(isinstance(tensor, nn.Parameter) for tensor in held):
            continue
        if _is_size(node) or all(source in found for source in _sources(node)):
            found.add(node)
    return found


def _is_size(node: fx.Node) -> bool:
    if node.meta.get("spec") is not None:
        return False
    return (node.op == "call_method" and node.target in ("size", "dim", "numel")) or (
        node.target is getattr and node.args[1] in ("shape", "device", "dtype", "ndim")
    )


def _is_part(node: fx.Node) -> bool:
    """Whether a node takes a part out of a structured value."""
    if node.target not in (operator.getitem, getattr):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and isinstance(source.meta.get("spec"), (tuple, list, dict))


def _homes(nodes: list[fx.Node], again: set[fx.Node]) -> dict[fx.Node, str]:
    """Return the module of each node that is computed once; parts stay with what they are part of."""
    home: dict[fx.Node, str] = {}
    for node in nodes:
        if node not in again:
            source = unmarked(node.all_input_nodes[0]) if node.all_input_nodes else None
            home[node] = home[source] if _is_part(node) and source in home else str(node.meta["owner"])
    return home


def _schedule(home: dict[fx.Node, str]) -> list[tuple[str, list[fx.Node]]]:
    """Group nodes by module: each module runs as far as it can before the next one does."""
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    previous: dict[str, fx.Node] = {}
    position = {node: i for i, node in enumerate(home)}
    for node, owner in home.items():
        graph.add_node(node)
        graph.add_edges_from((source, node) for source in _ancestors(node, home))
        if owner in previous:
            graph.add_edge(previous[owner], node)  # in-place ops and buffers depend on the order
        previous[owner] = node
    waiting = {node: graph.in_degree(node) for node in graph}
    ready = {home[node]: [node] for node, count in waiting.items() if count == 0}
    groups: list[tuple[str, list[fx.Node]]] = []
    while ready:
        owner = min(ready, key=lambda name: position[ready[name][0]])
        nodes: list[fx.Node] = []
        while ready.get(owner):
            node = ready[owner].pop(0)
            nodes.append(node)
            for follower in graph.successors(node):
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    ready.setdefault(home[follower], []).append(follower)
        del ready[owner]
        groups.append((owner, nodes))
    return groups


def _ancestors(node: fx.Node, home: dict[fx.Node, str]) -> Iterator[fx.Node]:
    """Yield the nodes computed once on which `node` depends, looking through what is computed again."""
    todo, seen = _sources(node), set()
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in home:
            yield source
        else:
            todo.extend(_sources(source))


def _append(
    groups: list[tuple[str, list[fx.Node]]], ir: TrainingGraph, extra: set[fx.Node]
) -> list[tuple[str, list[fx.Node]]]:
    """Let the last stage compute the outputs that no module has to."""
    nodes = [n for n in ir.inference.nodes if n in extra and n.op not in ("placeholder", "get_attr")]
    if not groups:
        return [(ir.last.name, nodes)] if nodes else []
    owner, last = groups[-1]
    return [*groups[:-1], (owner, [*last, *nodes])]


def _with_recomputed(nodes: list[fx.Node], again: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes of a stage and, before them, what it computes again, in the graph's order."""
    body: set[fx.Node] = set(nodes)
    todo = list(nodes)
    while todo:
        for source in _sources(todo.pop()):
            if source in again and source not in body:
                body.add(source)
                todo.append(source)
    order = next(iter(body)).graph.nodes if body else ()
    return [n for n in order if n in body]


def _read_later(node: fx.Node, k: int, bodies: list[list[fx.Node]]) -> bool:
    return any(node in map(unmarked, n.all_input_nodes) for body in bodies[k + 1 :] for n in body)
