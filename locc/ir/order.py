"""What must run before what, and the order in which a graph is written and printed."""

from __future__ import annotations

import heapq
from collections.abc import Container, Mapping

import networkx as nx
from torch import fx

from locc.ir import ops
from locc.ir.view import Owner


def dependencies(code: fx.Graph, chosen: Container[fx.Node] | None = None) -> nx.DiGraph[fx.Node]:
    """Return the graph "u runs before v" over the nodes of the training graph, or over some of them.

    Beside the data edges, the nodes of an owner's captured forward keep the order in which the user's
    code runs them: in-place ops and buffers depend on it. So do those of each replay, which sees buffers as
    the forward has left them; one that moves them has a place in the forward's own order, behind it. An
    `assign` has none: it commits at the end.
    """
    result: nx.DiGraph[fx.Node] = nx.DiGraph()
    previous: dict[tuple[str, int], fx.Node] = {}
    nodes = [n for n in code.nodes if chosen is None or n in chosen]
    result.add_nodes_from(nodes)  # in the graph's order, which breaks ties
    for node in nodes:
        result.add_edges_from((source, node) for source in node.all_input_nodes if source in result)
        replay, original = node.meta.get("replay", (0, None))
        runs = node.op in ("call_function", "call_method", "call_module") and node.target is not ops.assign
        if runs and (original is not None or node.meta.get("role") == "forward"):
            key = (node.meta.get("owner", ""), replay)
            if key in previous:
                result.add_edge(previous[key], node)
            if original is not None and original in result:
                result.add_edge(original, node)
            previous[key] = node
    return result


def program_order(code: fx.Graph, owners: Mapping[str, Owner]) -> list[fx.Node]:
    """Return the nodes in a valid order that finishes an owner's ready nodes first, earlier owners first."""
    graph = dependencies(code)
    position = {node: i for i, node in enumerate(code.nodes)}
    waiting = {node: graph.in_degree(node) for node in graph}
    ready: dict[tuple[int, int, str], list[int]] = {}
    nodes = list(code.nodes)

    def group(node: fx.Node) -> tuple[int, int, str]:
        owner = owners.get(node.meta.get("owner", ""))
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
