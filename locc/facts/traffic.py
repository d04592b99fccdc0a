"""What passes between modules, what they share, and whether they may run in a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from locc.facts.derive import Derivation
from locc.facts.names import Names, some
from locc.ir import Coupling, inner, ops
from locc.ir.captured import strip
from locc.ir.graph import TrainingGraph
from locc.ir.view import DATA


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
        staleness: how many steps ago the newest data came from which it is computed.
    """

    producer: str
    consumer: str
    kind: str
    value: str
    spec: str
    direction: str
    hops: int = 0
    staleness: int = 0


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
    kind = _kind(source, entry, facts)
    signal = facts.signals.get(source)
    hops = signal.hops if signal is not None and kind == "gradient" else 0
    spec = source.meta.get("spec")
    value = strip(str(source.target)) if source.op == "get_attr" else source.name
    text = str(spec) if spec is not None else ""
    return Flow(producer, consumer, kind, value, text, direction, hops, facts.ages[source])


def _kind(source: fx.Node, entry: fx.Node, facts: Derivation) -> str:
    if source.op == "get_attr" and source not in facts.held:
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
            text = f"{what} '{path}' is used by {some(list(owners))}, and changes in a step"
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


_ROLES = {"synthetic": "synthesiser", "label": "encoder"}
"""What the network is that nodes of some roles call."""


def by_role(ir: TrainingGraph) -> dict[str, dict[str, nn.Module]]:
    """Return the auxiliary networks of each module by role, as `Program.auxiliaries` gives them."""
    names = {owner.index: owner.name for owner in ir.modules}
    found: dict[str, dict[str, nn.Module]] = {}
    for node in ir.graph.nodes:
        if node.op != "call_module" or not str(node.target).startswith("aux."):
            continue
        held = found.setdefault(names[ir.owners[node.meta["owner"]].index], {})
        network = ir.root.get_submodule(str(node.target))
        if not any(network is other for other in held.values()):
            role = _ROLES.get(node.meta["role"], node.meta["role"])
            count = sum(key.rstrip("_0123456789") == role for key in held)
            held[role if not count else f"{role}_{count + 1}"] = network
    return found


def pipeline_exact(traffic: list[Flow], coupled: list[Coupling]) -> tuple[bool, str]:
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
