"""What must run before what, and the order in which a graph is written and printed."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import networkx as nx
from torch import fx

if TYPE_CHECKING:
    from locc.ir.graph import TrainingGraph


def dependencies(ir: TrainingGraph) -> nx.DiGraph[fx.Node]:
    """Return the graph "u runs before v" over all nodes of the training graph.

    Beside the data edges, the nodes of an owner's captured forward keep the order in which the user's
    code runs them: in-place ops, buffers and random numbers depend on it. So do those of a replay.
    """
    result: nx.DiGraph[fx.Node] = nx.DiGraph()
    previous: dict[tuple[str, str], fx.Node] = {}
    for node in ir.graph.nodes:
        result.add_node(node)
        result.add_edges_from((source, node) for source in node.all_input_nodes)
        key = (node.meta.get("owner", ""), node.meta.get("role", ""))
        if node.op in ("call_function", "call_method", "call_module") and key[1] in ("forward", "replay"):
            if key in previous:
                result.add_edge(previous[key], node)
            previous[key] = node
    return result


def program_order(ir: TrainingGraph) -> list[fx.Node]:
    """Return the nodes in a valid order that finishes an owner's ready nodes first, earlier owners first."""
    graph = dependencies(ir)
    position = {node: i for i, node in enumerate(ir.graph.nodes)}
    waiting = {node: graph.in_degree(node) for node in graph}
    ready: dict[tuple[int, int, str], list[int]] = {}
    nodes = list(ir.graph.nodes)

    def group(node: fx.Node) -> tuple[int, int, str]:
        owner = ir.owners.get(node.meta.get("owner", ""))
        if node.op in ("placeholder", "output"):
            return (-1 if node.op == "placeholder" else len(nodes), 0, "")
        return (owner.index, int(owner.auxiliary), owner.name) if owner else (len(nodes), 0, "")

    def offer(node: fx.Node) -> None:
        heapq.heappush(ready.setdefault(group(node), []), position[node])

    for node, count in waiting.items():
        if count == 0:
            offer(node)
    result: list[fx.Node] = []
    current: tuple[int, int, str] | None = None
    while ready:
        if current not in ready:
            current = min(ready)
        node = nodes[heapq.heappop(ready[current])]
        if not ready[current]:
            del ready[current]
        result.append(node)
        for follower in graph.successors(node):
            waiting[follower] -= 1
            if waiting[follower] == 0:
                offer(follower)
    return result
