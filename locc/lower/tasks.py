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
from locc.ir.order import dependencies
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
    """What a phase needs: its nodes, which of them carry a tape, and its backward passes."""

    needed: set[fx.Node]
    taped: set[fx.Node]
    leaves: set[fx.Node]
    backwards: list[BackwardTask]
    tapes: dict[BackwardTask, set[fx.Node]]
    trains: tuple[str, ...]


def analyse(ir: TrainingGraph, active: frozenset[str] | None) -> Analysis:
    """Find what a step needs in which only the owners `active` train (None: all of them)."""
    chosen = frozenset(ir.owners) if active is None else active
    objectives = [n for n in ir.objectives() if n.meta["owner"] in chosen]
    assigns = [n for n in ir.graph.nodes if n.target is ops.assign and n.meta["owner"] in chosen]
    changed = changers(ir.graph)
    states = [n for n in changed if n.op == "get_attr" and n.meta["owner"] in chosen]
    needed = _ancestors([*objectives, *assigns, *(c for n in states for c in changed[n])], changed)
    _add_delays(ir, needed, changed)
    if ir.loss is not None:
        if ir.loss.meta["owner"] in chosen:
            needed |= _ancestors([ir.loss], changed)
        elif all(n in needed for n in ir.loss.all_input_nodes):
            needed.add(ir.loss)
    scalars: dict[fx.Node, tuple[bool, list[fx.Node]]] = {}
    for node in ir.graph.nodes:
        if node in needed and node.target in (ops.objective, ops.gradient):
            scalar = _scalar(node)
            learns, gradients = scalars.get(scalar, (False, []))
            if node.target is ops.gradient:
                scalars[scalar] = (learns, [*gradients, node])
            else:
                scalars[scalar] = (True, gradients)
    backwards = [
        BackwardTask(str(s.meta["owner"]), s, learns, tuple(g)) for s, (learns, g) in scalars.items()
    ]
    tapes = {b: tape_of(b.scalar, changed) for b in backwards}
    leaves = {g.args[1] for b in backwards for g in b.gradients if isinstance(g.args[1], fx.Node)}
    taped = {n for tape in tapes.values() for n in tape}
    trained = {b.owner for b in backwards if b.trains}
    trains = tuple(o for o in ir.owners if o in trained and _learns(ir, o))
    return Analysis(needed, taped, leaves, backwards, tapes, trains)


def _add_delays(ir: TrainingGraph, needed: set[fx.Node], changed: Mapping[fx.Node, list[fx.Node]]) -> None:
    """Keep a delayed value moving in every phase that reads it, whoever trains."""
    delays = [n for n in ir.graph.nodes if ir.keeps(n)]
    while fresh := [n for n in delays if n not in needed and n.args[0] in needed]:
        needed |= _ancestors(fresh, changed)


def _scalar(node: fx.Node) -> fx.Node:
    scalar = node.args[0]
    assert isinstance(scalar, fx.Node)
    return scalar


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
    for source, node in dependencies(ir.graph).edges:
        if source in scope and node in scope and task(source) != task(node):
            graph.add_edge(task(source), task(node))
    backwards = [b for b in found.backwards if b.scalar in scope and b.scalar not in region]
    for backward in backwards:
        graph.add_edge(backward.scalar, backward)
        for gradient in backward.gradients:
            graph.add_edge(backward, gradient)
            leaf = gradient.args[1]
            if leaf in scope:
                graph.add_edge(task(leaf), backward)  # type: ignore[arg-type]
    _add_writes(ir, found, graph, task, inside)
    return graph


def _sorted(ir: TrainingGraph, graph: nx.DiGraph[Task]) -> list[Task]:
    """Return tasks in a valid order: writes, then backward passes, then nodes, each as soon as they can."""
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
    """Order every write of a parameter or state after all that reads the old value, under whatever path.

    What only shares its memory (a view that an earlier instruction made) is copied when the write runs.
    """
    readers = _readers(ir, found.needed)
    assigns = [n for n in found.needed if n.target is ops.assign and n.meta.get("repeat") == inside]
    for owner in found.trains if inside is None else ():
        update = UpdateTask(owner)
        for backward in found.backwards:
            if backward.owner == owner and backward.trains:
                graph.add_edge(backward, update)
        own = {memory_of(p) for p in ir.parameters(owner).values() if p.requires_grad}
        _after(graph, found, task, {n for key in own for n in readers.get(key, ())}, update)
        for node in assigns:
            if memory_of(_state(ir, node)) in own:
                graph.add_edge(update, node)  # of two writes the assigned value holds
    for node in assigns:
        _after(graph, found, task, readers.get(memory_of(_state(ir, node)), set()) - {node}, node)


def _state(ir: TrainingGraph, node: fx.Node) -> torch.Tensor:
    ((_, tensor),) = node_tensors(ir.root, _scalar(node))
    return tensor


def _after(
    graph: nx.DiGraph[Task],
    found: Analysis,
    task: Callable[[fx.Node], Task],
    reading: set[fx.Node],
    write: Task,
) -> None:
    reading = {n for n in reading if n.target is not ops.assign}  # what it sets is no value that it reads
    for node in reading:
        if graph.has_node(task(node)) and task(node) != write:
            graph.add_edge(task(node), write)
    for backward, tape in found.tapes.items():
        if reading & tape and graph.has_node(backward):
            graph.add_edge(backward, write)


def memory_of(tensor: torch.Tensor) -> int:
    """Return what is equal for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


def _readers(ir: TrainingGraph, needed: set[fx.Node]) -> dict[int, set[fx.Node]]:
    """Return, for each memory of the root, the nodes that read it: as a leaf's own, or as an argument."""
    result: dict[int, set[fx.Node]] = {}
    for node in needed:
        for _, tensor in node_tensors(ir.root, node):
            using = {node} if node.op == "call_module" else set(_through(node))
            result.setdefault(memory_of(tensor), set()).update(u for u in using if u in needed)
    return result


def _through(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that use a value, looking through `stop_gradient`, which shares its storage."""
    found: list[fx.Node] = []
    for user in node.users:
        found.append(user)
        if user.target is ops.stop_gradient:
            found.extend(_through(user))
    return found
