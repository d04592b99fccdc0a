"""The longest chain of module-steps in a training step."""

from __future__ import annotations

import networkx as nx
from torch import fx

from locc.ir import ops
from locc.ir.graph import TrainingGraph
from locc.ir.view import node_parameters
from locc.lower.tasks import Analysis, BackwardTask, RegionTask, Task, analyse, order


def critical_path(ir: TrainingGraph, active: frozenset[str] | None = None) -> list[str]:
    """Return the longest chain of module-steps in one training step.

    A module-step is a stretch of an owner's code that runs layers with parameters, or multiplies or solves
    matrices (a closed form), or one backward pass through such; a repeated region counts once for each round.
    """
    found = analyse(ir, active)
    return _longest(ir, found, order(ir, found, found.needed))


def _longest(ir: TrainingGraph, found: Analysis, tasks: list[Task]) -> list[str]:
    graph: nx.DiGraph[int] = nx.DiGraph()
    home: dict[fx.Node, int] = {}
    steps: list[list[str]] = []
    key: tuple[str, bool] | None = None

    def new(label: list[str]) -> int:
        steps.append(label)
        graph.add_node(len(steps) - 1)
        return len(steps) - 1

    def read(nodes: list[fx.Node], i: int) -> None:
        graph.add_edges_from((home[n], i) for n in nodes if n in home and home[n] != i)

    for task in tasks:
        if isinstance(task, fx.Node):
            if task.op in ("placeholder", "get_attr", "output") or task.target in (
                ops.objective,
                ops.gradient,
            ):
                continue
            kind = (str(task.meta["owner"]), task in found.taped)
            i = len(steps) - 1 if kind == key else new([])
            key = kind
            home[task] = i
            read(task.all_input_nodes, i)
            if not steps[i] and _layered(ir, task):
                steps[i].append(f"{kind[0]} forward")
        elif isinstance(task, BackwardTask):
            key = None
            deep = any(_layered(ir, n) for n in found.tapes[task])
            i = new([f"{task.owner} backward"] if deep else [])
            read([task.scalar, *(g.args[1] for g in task.gradients if isinstance(g.args[1], fx.Node))], i)
            home.update(dict.fromkeys(task.gradients, i))
        elif isinstance(task, RegionTask):
            key = None
            i = new(_region(ir, found, task))
            held = [n for n in found.needed if n.meta.get("repeat") == task.name]
            for node in held:
                read(node.all_input_nodes, i)
            home.update(dict.fromkeys(held, i))
    return _heaviest(graph, steps)


def _region(ir: TrainingGraph, found: Analysis, task: RegionTask) -> list[str]:
    region = ir.repeats[task.name]
    entries = {entry for entry, _ in region.carried}
    scope = {n for n in found.needed if n.meta.get("repeat") == task.name}
    body = _longest(ir, found, order(ir, found, scope - entries, inside=task.name))
    return body * region.times


def _heaviest(graph: nx.DiGraph[int], steps: list[list[str]]) -> list[str]:
    best: dict[int, tuple[int, int | None]] = {}
    for i in nx.topological_sort(graph):
        before = max(((best[p][0], p) for p in graph.predecessors(i)), default=(0, None))
        best[i] = (before[0] + len(steps[i]), before[1])
    if not best:
        return []
    chain, at = [], max(best, key=lambda i: best[i][0])
    cursor: int | None = at
    while cursor is not None:
        chain.append(cursor)
        cursor = best[cursor][1]
    return [label for i in reversed(chain) for label in steps[i]]


def _layered(ir: TrainingGraph, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return False
    return bool(node.meta.get("contracts") or node_parameters(ir.root, node)) or any(
        s.op == "get_attr" and node_parameters(ir.root, s) for s in node.all_input_nodes
    )
