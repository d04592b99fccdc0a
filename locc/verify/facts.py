"""What follows from the graph alone: traffic, locking, modularity, couplings, critical path."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch import fx

from locc.ir import Coupling, inner, ops
from locc.ir.captured import strip
from locc.ir.graph import TrainingGraph
from locc.ir.view import DATA, node_parameters
from locc.lower.tasks import Analysis, BackwardTask, RegionTask, Task, analyse, order
from locc.verify.derive import Derivation
from locc.verify.names import Names

STRICT, WEAK, NOT = "strictly modular", "weakly modular", "not modular"


@dataclass(frozen=True)
class Flow:
    """A value that passes from one owner to another.

    Attributes:
        producer: owner that computes it; "data" for the batch itself.
        consumer: owner that reads it.
        kind: "activation", "target", "gradient", "synthetic gradient", "error", "label", "input" or "state".
        value: name of the node.
        spec: shape and dtype.
        direction: "up" to a later module in the order of the values, "down" to an earlier one, "within" a
            module and its auxiliaries.
        hops: for a gradient, how many modules' layers it was back-propagated through.
    """

    producer: str
    consumer: str
    kind: str
    value: str
    spec: str
    direction: str
    hops: int = 0


@dataclass(frozen=True)
class Locking:
    """What an owner's update waits for within one step.

    Attributes:
        forward: it needs values that earlier modules compute from the batch.
        update: the later modules whose forward it waits for.
        backward: the later modules whose backward pass, through their layers, it waits for.
        depth: the longest chain of such backward passes.
        trains_on: the gradient of a later module's objective in which its own objective is linear, or None.
    """

    forward: bool
    update: tuple[str, ...]
    backward: tuple[str, ...]
    depth: int
    trains_on: str | None
    hops: int


def flows(ir: TrainingGraph, facts: Derivation) -> list[Flow]:
    """Return everything that passes between owners, and from the batch to them."""
    found: dict[Flow, None] = {}
    for node in ir.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        for source in node.all_input_nodes:
            if source.meta.get("owner") != node.meta.get("owner"):
                found[_flow(ir, source, node, facts)] = None
    return list(found)


def _flow(ir: TrainingGraph, source: fx.Node, entry: fx.Node, facts: Derivation) -> Flow:
    producer, consumer = str(source.meta.get("owner")), str(entry.meta.get("owner"))
    there, here = facts.place(source), facts.place(entry)
    direction = "within" if there == here else "up" if there < here else "down"
    kind = _kind(ir, source, entry, facts)
    signal = facts.signals.get(source)
    hops = signal.hops if signal is not None and kind == "gradient" else 0
    spec = source.meta.get("spec")
    value = strip(str(source.target)) if source.op == "get_attr" else source.name
    return Flow(producer, consumer, kind, value, str(spec) if spec is not None else "", direction, hops)


def _kind(ir: TrainingGraph, source: fx.Node, entry: fx.Node, facts: Derivation) -> str:
    if source.op == "get_attr":
        return "state"
    traits = facts.traits[source]
    if traits and traits <= {"label"}:
        return "label"
    if traits <= {"input"}:
        return "input"
    signal = facts.signals.get(source)
    if signal is not None and signal.pure:
        return "gradient" if signal.hops else "error"
    if not traits & {"gradient", "error"} and _as_gradient(entry):
        return "synthetic gradient"
    if traits & {"gradient", "error", "label"}:
        return "target"
    return "activation"


def _as_gradient(entry: fx.Node) -> bool:
    """Whether a value, possibly rescaled on the way, is used only as the gradient that <h, value> injects."""
    todo, found = [entry], False
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.target is inner and user.args[1] is node:
                found = True
            elif len(user.all_input_nodes) == 1 and user.target is not ops.objective:
                todo.append(user)
            else:
                return False
    return found


def locking(ir: TrainingGraph, facts: Derivation, owner: str) -> Locking:
    """Return what the update of an owner waits for."""
    index = facts.rank[owner]
    roots = [*ir.objectives(owner), *(n for n in ir.nodes(owner) if n.target is ops.assign)]
    needed = facts.closure(roots)
    later = [n for n in needed if facts.place(n) > index and n.op not in ("get_attr", "placeholder")]
    passed = [n for n in later if n in facts.layered]
    forward = any(-1 < facts.place(n) < index and "input" in facts.traits[n] for n in needed)
    linear = None
    for objective in ir.objectives(owner):
        signal = facts.signals.get(objective)
        if signal is not None and signal.hops:
            sources = [n for n in _linear_sources(objective, facts) if facts.place(n) > index]
            if sources and (linear is None or signal.hops > linear[1]):
                linear = (sources[0].name, signal.hops)
    return Locking(
        forward,
        _named(ir, later),
        _named(ir, passed),
        _depth(ir, needed, owner, facts),
        linear[0] if linear else None,
        linear[1] if linear else 0,
    )


def _linear_sources(node: fx.Node, facts: Derivation) -> list[fx.Node]:
    """Return the layer-crossing gradients of which a node is a linear image, nearest first."""
    found, seen, todo = [], {node}, [node]
    while todo:
        step = todo.pop(0)
        if step in facts.layered:
            found.append(step)
            continue
        for source in step.all_input_nodes:
            if source in facts.signals and source not in seen:
                seen.add(source)
                todo.append(source)
    return found


def _named(ir: TrainingGraph, nodes: list[fx.Node]) -> tuple[str, ...]:
    held = {str(n.meta["owner"]) for n in nodes}
    return tuple(name for name in ir.owners if name in held)


def _depth(ir: TrainingGraph, needed: set[fx.Node], owner: str, facts: Derivation) -> int:
    """Return how many layer-crossing gradients of later owners lie on one path to an owner's objectives."""
    depth: dict[fx.Node, int] = {}
    index = facts.rank[owner]
    for node in ir.graph.nodes:
        if node in needed:
            below = max((depth[s] for s in node.all_input_nodes if s in depth), default=0)
            depth[node] = below + int(node in facts.layered and facts.place(node) > index)
    return max(depth.values(), default=0)


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
            f"{len(chained)} of {len(modules)} modules ({_some(chained)}) train on a gradient that was "
            f"back-propagated through later modules; the longest chain "
            f"crosses {locks[worst].hops}, to '{worst}'",
        )
    reasons = []
    for name, lock in locks.items():
        if lock.backward:
            what = "a gradient" if lock.depth == 1 else f"a chain of {lock.depth} gradients"
            hop = " (one hop)" if lock.depth == 1 else ""
            reasons.append(
                f"'{name}' depends on {what} through the layers of {_some(list(lock.backward))}{hop}"
            )
        elif lock.update:
            reasons.append(f"'{name}' depends on values of {_some(list(lock.update))}")
    if reasons:
        return WEAK, tuple(reasons)
    order = [o.name for o in sorted(ir.modules, key=lambda o: facts.rank[o.name])]
    same = order == [o.name for o in ir.modules]
    return STRICT, (
        "no module trains on anything that a later module computes"
        + (
            ""
            if same
            else f", in the order {_some(order)}: nothing comes back to a module that depends on it"
        ),
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def couplings(ir: TrainingGraph, written: dict[str, set[str]] | None) -> list[Coupling]:
    """Return the state that modules share: tied parameters, buffers, BatchNorm statistics, attributes.

    `written` says which buffers and tensor attributes changed in a run, and by whose code; None where
    nothing ran.
    """
    buffers = {o.path: o.owners for o in Names.of(ir).buffers.values()}
    changed = buffers if written is None else {path: tuple(sorted(who)) for path, who in written.items()}
    found = list(dict.fromkeys(ir.couplings))
    attributes = {path: owners for path, owners in changed.items() if path not in buffers}
    for path, owners in {**buffers, **attributes}.items():
        if len(owners) > 1 and path in changed:
            statistics = path.endswith(("running_mean", "running_var"))
            what = "BatchNorm statistics" if statistics else "buffer" if path in buffers else "tensor"
            text = f"{what} '{path}' is used by {_some(list(owners))}, and changes in a step"
            found.append(Coupling(path, owners, text))
    return found


def auxiliaries(ir: TrainingGraph) -> dict[str, list[str]]:
    """Return the auxiliary networks that each owner runs, and the owners that are auxiliaries themselves."""
    found: dict[str, list[str]] = {}
    for node in ir.graph.nodes:
        path = str(node.target)
        if node.op in ("call_module", "get_attr") and path.startswith("aux."):
            name = path.split(".")[1]
            held = found.setdefault(str(node.meta.get("owner")), [])
            if name not in held:
                held.append(name)
    for owner in ir.owners.values():
        if owner.auxiliary:
            found.setdefault(owner.name, [])
    return found


def pipeline_exact(ir: TrainingGraph, traffic: list[Flow], coupled: list[Coupling]) -> tuple[bool, str]:
    """Whether pipelined training has the trajectory of lock-step training, and why not."""
    down = [f for f in traffic if f.direction == "down"]
    if down:
        ends = f"from '{down[0].producer}' to '{down[0].consumer}'"
        return False, f"{down[0].kind} '{down[0].value}' travels down, {ends}"
    state = [f for f in traffic if f.kind == "state" and f.producer != DATA]
    if state:
        return False, f"'{state[0].consumer}' reads '{state[0].value}', which '{state[0].producer}' trains"
    live = [coupling for coupling in coupled if coupling.live]
    if live:
        return False, live[0].text
    return True, "only detached values and labels travel, and only upward"


# ---- critical path -------------------------------------------------------------------------


def critical_path(ir: TrainingGraph, active: frozenset[str] | None = None) -> list[str]:
    """Return the longest chain of module-steps in one training step.

    A module-step is a stretch of an owner's forward that runs layers with parameters, or one backward
    pass through such layers; a repeated region counts once for each round.
    """
    found = analyse(ir, active)
    return _longest(ir, found, order(ir, found, found.needed), None)


def _longest(ir: TrainingGraph, found: Analysis, tasks: list[Task], inside: str | None) -> list[str]:
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
    body = _longest(ir, found, order(ir, found, scope - entries, inside=task.name), task.name)
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
    return bool(node_parameters(ir.root, node)) or any(
        s.op == "get_attr" and node_parameters(ir.root, s) for s in node.all_input_nodes
    )
