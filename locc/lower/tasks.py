"""The training graph as tasks, and the order in which they run.

A task is a node of the graph, the backward pass of one scalar, or the update of one owner. Backward
passes and updates go first as soon as they can, so that activations and gradients of an owner are
released before the next owner needs memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from locc.errors import GraphError
from locc.ir import ops
from locc.ir.graph import TrainingGraph
from locc.ir.memory import memory_of
from locc.ir.order import dependencies
from locc.ir.readers import readers
from locc.ir.tape import changers, tape_of
from locc.ir.view import node_tensors


@dataclass(frozen=True)
class BackwardTask:
    """Back-propagates `scalar` through its owner: for its parameters if `trains`, and for `gradients`."""

    owner: str
    scalar: fx.Node
    trains: bool
    gradients: tuple[fx.Node, ...]


@dataclass(frozen=True)
class UpdateTask:
    """One optimizer step of an owner."""

    owner: str


@dataclass(frozen=True)
class RegionTask:
    """A repeated region."""

    name: str


Task = fx.Node | BackwardTask | UpdateTask | RegionTask


@dataclass
class Analysis:
    """What a phase needs: its nodes, which of them carry a tape, and its backward passes.

    `before` is the graph "u runs before v" over the needed nodes, and `readers` maps each memory of the root
    to those that read it. The values of `watched` nodes are there to be looked at when they are computed.
    """

    needed: set[fx.Node]
    taped: set[fx.Node]
    leaves: set[fx.Node]
    backwards: list[BackwardTask]
    tapes: dict[BackwardTask, set[fx.Node]]
    trains: tuple[str, ...]
    before: nx.DiGraph[fx.Node]
    readers: dict[int, set[fx.Node]]
    watched: frozenset[fx.Node] = frozenset()


def needed_nodes(ir: TrainingGraph, active: frozenset[str] | None) -> set[fx.Node]:
    """Return the nodes of a step in which only the owners `active` train (None: all of them)."""
    changed = changers(ir.graph)
    chosen = frozenset(ir.owners) if active is None else active
    objectives = [n for n in ir.objectives() if n.meta["owner"] in chosen]
    assigns = [n for n in ir.graph.nodes if n.target is ops.assign and n.meta["owner"] in chosen]
    states = [n for n in changed if n.op == "get_attr" and n.meta["owner"] in chosen]
    needed = _ancestors([*objectives, *assigns, *(c for n in states for c in changed[n])], changed)
    _add_delays(ir, needed, changed)
    if ir.loss is not None:
        if ir.loss.meta["owner"] in chosen:
            needed |= _ancestors([ir.loss], changed)
        elif all(n in needed for n in ir.loss.all_input_nodes):
            needed.add(ir.loss)
    return needed


def analyse(ir: TrainingGraph, active: frozenset[str] | None) -> Analysis:
    """Find what a step needs in which only the owners `active` train (None: all of them)."""
    needed = needed_nodes(ir, active)
    changed = changers(ir.graph)
    scalars: dict[fx.Node, tuple[bool, list[fx.Node]]] = {}
    for node in ir.graph.nodes:
        if node in needed and node.target in (ops.objective, ops.gradient):
            scalar = argument(node, 0)
            learns, gradients = scalars.get(scalar, (False, []))
            if node.target is ops.gradient:
                scalars[scalar] = (learns, [*gradients, node])
            else:
                scalars[scalar] = (True, gradients)
    backwards = [
        BackwardTask(str(s.meta["owner"]), s, learns, tuple(g)) for s, (learns, g) in scalars.items()
    ]
    tapes = {b: tape_of(b.scalar, changed) for b in backwards}
    leaves = {argument(g, 1) for b in backwards for g in b.gradients}
    taped = {n for tape in tapes.values() for n in tape}
    trained = {b.owner for b in backwards if b.trains}
    trains = tuple(o for o in ir.owners if o in trained and _learns(ir, o))
    before = dependencies(ir.graph, needed)
    return Analysis(needed, taped, leaves, backwards, tapes, trains, before, readers(ir.root, needed))


def _add_delays(ir: TrainingGraph, needed: set[fx.Node], changed: Mapping[fx.Node, list[fx.Node]]) -> None:
    """Keep a delayed value moving in every phase that reads it, whoever trains."""
    delays = [n for n in ir.graph.nodes if ir.keeps(n)]
    while fresh := [n for n in delays if n not in needed and n.args[0] in needed]:
        needed |= _ancestors(fresh, changed)


def argument(node: fx.Node, index: int) -> fx.Node:
    """Return an argument that is a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def _learns(ir: TrainingGraph, owner: str) -> bool:
    """Whether an owner has anything to update: a frozen or borrowing module may have an objective without."""
    return any(p.requires_grad for p in ir.parameters(owner).values())


def _ancestors(roots: list[fx.Node], changed: Mapping[fx.Node, list[fx.Node]]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
            todo.extend(changed.get(node, ()))
    return seen


def order(ir: TrainingGraph, found: Analysis, scope: set[fx.Node], inside: str | None = None) -> list[Task]:
    """Return the tasks of `scope` (a phase, or the nodes of one region) in the order in which they run."""
    return _sorted(ir, task_graph(ir, found, scope, inside))


def task_graph(
    ir: TrainingGraph, found: Analysis, scope: set[fx.Node], inside: str | None = None
) -> nx.DiGraph[Task]:
    """Return the graph "u runs before v" over the tasks of `scope`."""
    region = {n: RegionTask(n.meta["repeat"]) for n in scope if n.meta.get("repeat") not in (None, inside)}

    def task(node: fx.Node) -> Task:
        return region.get(node, node)

    graph: nx.DiGraph[Task] = nx.DiGraph()
    graph.add_nodes_from(task(node) for node in ir.graph.nodes if node in scope)
    for node in scope:
        for source in found.before.predecessors(node):
            if source in scope and task(source) != task(node):
                graph.add_edge(task(source), task(node))
    backwards = [b for b in found.backwards if b.scalar in scope and b.scalar not in region]
    for backward in backwards:
        graph.add_edge(backward.scalar, backward)
        for gradient in backward.gradients:
            graph.add_edge(backward, gradient)
            leaf = argument(gradient, 1)
            if leaf in scope:
                graph.add_edge(task(leaf), backward)
    _add_writes(ir, found, graph, task, inside)
    return graph


def _sorted(ir: TrainingGraph, graph: nx.DiGraph[Task]) -> list[Task]:
    """Return tasks in a valid order: reads of state, writes, backward passes, then nodes, each at once."""
    position = {node: i for i, node in enumerate(ir.graph.nodes)}
    first = {n.meta["repeat"]: n for n in reversed(ir.graph.nodes) if "repeat" in n.meta}

    def key(item: Task) -> tuple[int, int, int, int]:
        if isinstance(item, UpdateTask):
            return (0, ir.owners[item.owner].index, 0, 0)
        if isinstance(item, fx.Node) and item.target is ops.assign:
            return (0, ir.owners[item.meta["owner"]].index, 1, position[item])
        if isinstance(item, BackwardTask):
            return (1, ir.owners[item.owner].index, 0, position[item.scalar])
        node = item if isinstance(item, fx.Node) else first[item.name]
        if node.op == "get_attr":  # what a module lends, it lends at once
            return (0, -1, 0, position[node])
        owner = ir.owners.get(node.meta["owner"])
        return (2, owner.index if owner else -1, int(owner.auxiliary) if owner else 0, position[node])

    if not nx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(getattr(u, "name", type(u).__name__) for u, _ in nx.find_cycle(graph))
        raise GraphError(f"the step has no valid order: {cycle}")
    return list(nx.lexicographical_topological_sort(graph, key=key))


def _add_writes(
    ir: TrainingGraph,
    found: Analysis,
    graph: nx.DiGraph[Task],
    task: Callable[[fx.Node], Task],
    inside: str | None,
) -> None:
    """Order every write of a parameter or state after all that reads the old value, under whatever path."""
    assigns = {
        n: memory_of(_state(ir, n))
        for n in found.needed
        if n.target is ops.assign and n.meta.get("repeat") == inside
    }
    for owner in found.trains if inside is None else ():
        update = UpdateTask(owner)
        for backward in found.backwards:
            if backward.owner == owner and backward.trains:
                graph.add_edge(backward, update)
        for memory in {memory_of(p) for p in ir.parameters(owner).values() if p.requires_grad}:
            _after(found, graph, task, memory, update)
            # Of two writes the assigned value holds.
            graph.add_edges_from((update, node) for node, other in assigns.items() if other == memory)
    for node, memory in assigns.items():
        _after(found, graph, task, memory, node)


def _state(ir: TrainingGraph, assign: fx.Node) -> torch.Tensor:
    ((_, tensor),) = node_tensors(ir.root, argument(assign, 0))
    return tensor


def _after(
    found: Analysis, graph: nx.DiGraph[Task], task: Callable[[fx.Node], Task], memory: int, write: Task
) -> None:
    """Order a write after what reads the memory, now or in a backward pass.

    An `assign` of what lies there is no reader: the value is in flight, and copied when the write runs.
    """
    reading = {n for n in found.readers.get(memory, ()) if n.target is not ops.assign}
    tasks = {task(n) for n in reading}
    for backward, tape in found.tapes.items():
        if not reading.isdisjoint(tape):  # its backward pass; one inside of a region, whenever that runs
            tasks.add(backward if graph.has_node(backward) else task(backward.scalar))
    graph.add_edges_from((t, write) for t in tasks if t != write and graph.has_node(t))
