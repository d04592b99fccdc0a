"""What the update of a module waits for, and the verdict on a program that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch import fx

from locc.facts.derive import Derivation
from locc.facts.names import some
from locc.ir import ops
from locc.ir.graph import TrainingGraph

STRICT, WEAK, NOT = "strictly modular", "weakly modular", "not modular"


@dataclass(frozen=True)
class Locking:
    """What the update of an owner depends on, and what of it it waits for within one step.

    Attributes:
        forward: it needs values that earlier modules compute from the batch.
        update: the later modules whose forward it waits for.
        backward: the later modules whose backward pass, through their layers, it waits for.
        depth: the longest chain of such backward passes.
        values: the later modules whose values it depends on, those of earlier steps included.
        gradients: the later modules whose backward pass it depends on, likewise.
        chain: the longest chain of these.
        trains_on: the gradient of a later module's objective in which its own objective is linear, or None.
        hops: how many modules' layers that gradient has crossed.
    """

    forward: bool
    update: tuple[str, ...]
    backward: tuple[str, ...]
    depth: int
    values: tuple[str, ...]
    gradients: tuple[str, ...]
    chain: int
    trains_on: str | None
    hops: int


def locking(ir: TrainingGraph, facts: Derivation, owner: str) -> Locking:
    """Return what the update of an owner depends on and waits for."""
    index = facts.rank[owner]
    objectives = ir.objectives(owner)
    roots = [*objectives, *(n for n in ir.nodes(owner) if n.target is ops.assign and _learns(n))]
    within = facts.closure(roots)
    update, backward = _later(ir, facts, within, index)
    depth = _depth(ir, facts, within, index)
    values, gradients, chain = update, backward, depth
    if facts.held:  # what is left for later steps is no update, but an update may come from it
        everything = facts.closure(roots, across=True)
        values, gradients = _later(ir, facts, everything, index)
        chain = _chain(facts, everything, index)
    forward = any(
        -1 < facts.place(n) < index and n not in facts.held and "input" in facts.traits[n] for n in within
    )
    linear: tuple[str, int] | None = None
    for objective in objectives:
        signal = facts.signals.get(objective)
        if signal is not None and signal.hops:
            sources = [n for n in _linear_sources(objective, facts) if facts.place(n) > index]
            if sources and (linear is None or signal.hops > linear[1]):
                linear = (sources[0].name, signal.hops)
    trains_on, hops = linear or (None, 0)
    return Locking(forward, update, backward, depth, values, gradients, chain, trains_on, hops)


def _learns(assign: fx.Node) -> bool:
    """Whether an `assign` is part of what an owner learns, and not a state for the next step."""
    return "state" not in assign.all_input_nodes[0].meta


def _later(
    ir: TrainingGraph, facts: Derivation, needed: set[fx.Node], index: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the later owners whose values are needed, and those through whose layers a gradient passes."""
    later = [n for n in needed if facts.place(n) > index and n.op not in ("get_attr", "placeholder")]
    return _named(ir, later), _named(ir, [n for n in later if n in facts.layered])


def _depth(ir: TrainingGraph, facts: Derivation, needed: set[fx.Node], index: int) -> int:
    """Return how many layer-crossing gradients of later owners lie on one path within the step."""
    depth: dict[fx.Node, int] = {}
    for node in ir.graph.nodes:
        if node in needed:
            below = max((depth[s] for s in node.all_input_nodes if s in depth), default=0)
            depth[node] = below + int(node in facts.layered and facts.place(node) > index)
    return max(depth.values(), default=0)


def _chain(facts: Derivation, needed: set[fx.Node], index: int) -> int:
    """Return the same across steps; round a loop of states, each gradient counts once."""
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    graph.add_nodes_from(needed)
    graph.add_edges_from((s, n) for n in needed for s in facts.sources(n, across=True) if s in needed)
    rings = nx.condensation(graph)
    longest: dict[int, int] = {}
    for ring in nx.topological_sort(rings):
        passed = [n for n in rings.nodes[ring]["members"] if n in facts.layered and facts.place(n) > index]
        before = max((longest[r] for r in rings.predecessors(ring)), default=0)
        longest[ring] = before + len(passed)
    return max(longest.values(), default=0)


def _linear_sources(node: fx.Node, facts: Derivation) -> list[fx.Node]:
    """Return the layer-crossing gradients of which a node is a linear image, nearest first."""
    found, seen, todo = [], {node}, [node]
    while todo:
        step = todo.pop(0)
        if step in facts.layered:
            found.append(step)
            continue
        for source in (*step.all_input_nodes, *facts.held.get(step, ())):
            if source in facts.signals and source not in seen:
                seen.add(source)
                todo.append(source)
    return found


def _named(ir: TrainingGraph, nodes: list[fx.Node]) -> tuple[str, ...]:
    held = {str(n.meta["owner"]) for n in nodes}
    return tuple(name for name in ir.owners if name in held)


def modularity(
    ir: TrainingGraph, facts: Derivation, locks: dict[str, Locking]
) -> tuple[str, tuple[str, ...]]:
    """Return the verdict and its reasons.

    - not modular: some module's objective is linear in a gradient that came through the layers of a later
      module (the chain rule across modules: backpropagation, or its imitation through fixed matrices).
    - weakly modular: no such module, but something trains on values that later modules compute.
    - strictly modular: everything that an owner trains on is computed by it, by earlier ones, or is a label.

    Earlier and later are meant in the order of the values (`Derivation.rank`).
    """
    if len(ir.modules) == 1:
        return NOT, ("there is one module, which is trained end to end",)
    modules = [o.name for o in ir.modules]
    chained = [name for name in modules if locks[name].trains_on]
    if chained:
        worst = max(chained, key=lambda name: locks[name].hops)
        return NOT, (
            f"{len(chained)} of {len(modules)} modules ({some(chained)}) train on a gradient that was "
            f"back-propagated through later modules; the longest chain "
            f"crosses {locks[worst].hops}, to '{worst}'",
        )
    reasons = []
    for name, lock in locks.items():
        late = "" if lock.update else ", of earlier steps"
        if lock.gradients:
            what = "a gradient" if lock.chain == 1 else f"a chain of {lock.chain} gradients"
            hop = " (one hop)" if lock.chain == 1 else ""
            reasons.append(
                f"'{name}' depends on {what} through the layers of {some(list(lock.gradients))}{hop}{late}"
            )
        elif lock.values:
            reasons.append(f"'{name}' depends on values of {some(list(lock.values))}{late}")
    if reasons:
        return WEAK, tuple(reasons)
    order = [o.name for o in sorted(ir.modules, key=lambda o: facts.rank[o.name])]
    same = order == [o.name for o in ir.modules]
    return STRICT, (
        "no module trains on anything that a later module computes"
        + (
            "" if same else f", in the order {some(order)}: nothing comes back to a module that depends on it"
        ),
    )
