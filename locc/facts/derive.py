"""What each value of the graph is made of: the ground of every fact that a certificate states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn

from locc.ir import ops
from locc.ir.captured import owned_tensor
from locc.ir.graph import TrainingGraph
from locc.ir.spec import TensorSpec
from locc.ir.state import State
from locc.ir.time import ages, held
from locc.ir.view import DATA, node_parameters

_LINEAR_LAYERS = (nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Signal:
    """A value that is a linear image of a gradient of another scalar.

    Attributes:
        hops: how many modules' layers that gradient was back-propagated through in a chain; 0 for the
            error at an output, which went through no layer.
        pure: whether it is nothing but the gradient (zero where the gradient is zero).
    """

    hops: int
    pure: bool


@dataclass
class Derivation:
    """Facts on every node.

    Attributes:
        parents: what a node's value depends on within the step, round a repeated region included.
        held: for a read of what the step before has left, the values that it was set to.
        ages: how many steps ago the newest data came from which a value is computed.
        layered: `gradient` nodes whose gradient passes through layers with parameters.
        traits: what a value is computed from: "input", "label", "parameter", "gradient", "error".
        signals: nodes that are linear in a gradient.
        doubtful: nodes whose linearity could not be tried and is assumed.
        rank: each owner's place in the order of the values: forward order, unless the owners can be put
            in an order in which every value goes to a later one; an auxiliary has its module's place.
        target: a target for `batch` samples, for trying functions on.
    """

    parents: dict[fx.Node, list[fx.Node]]
    held: dict[fx.Node, list[fx.Node]]
    ages: dict[fx.Node, int]
    layered: set[fx.Node]
    traits: dict[fx.Node, frozenset[str]]
    signals: dict[fx.Node, Signal]
    doubtful: list[str]
    rank: dict[str, int]
    target: Any = None
    batch: int = 2

    def place(self, node: fx.Node) -> int:
        """Return the place of a node's owner; -1 for the batch itself."""
        return self.rank.get(str(node.meta.get("owner", DATA)), -1)

    def closure(self, roots: list[fx.Node], across: bool = False) -> set[fx.Node]:
        """Return everything that the values of `roots` depend on, themselves included.

        Within the step, or `across` steps: also by way of what earlier ones have left.
        """
        seen, todo = set(roots), list(roots)
        while todo:
            for source in self.sources(todo.pop(), across):
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        return seen

    def sources(self, node: fx.Node, across: bool) -> list[fx.Node]:
        """Return what a value depends on directly."""
        return [*self.parents.get(node, ()), *(self.held.get(node, ()) if across else ())]


def derive(ir: TrainingGraph, batch: int = 2, target: Any = None) -> Derivation:
    """Read off what each value is made of; a target for `batch` samples lets losses be tried, too."""
    parents = {node: list(node.all_input_nodes) for node in ir.graph.nodes}
    for region in ir.repeats.values():
        for entry, end in region.carried:
            parents[entry].append(end)
    layered = {n for n in ir.gradients() if _passes_layers(ir, n)}
    earlier = held(ir)
    traits = _traits(ir, layered, earlier)
    result = Derivation(parents, earlier, ages(ir), layered, traits, {}, [], _ranks(ir), target, batch)
    _find_signals(ir, result)
    return result


def _find_signals(ir: TrainingGraph, known: Derivation) -> None:
    """Find the values that are linear in a gradient, by way of what earlier steps have left as well.

    A read is linear where what was left is, starting from the gradients of the step (the least fixed point);
    of these, it is nothing but a gradient as long as nothing shows otherwise (the greatest).
    """
    most = len(known.layered)  # round a loop of states a chain has no end: each gradient counts once
    reads: dict[fx.Node, Signal] = {}
    while True:
        _sweep(ir, known, reads)
        found = dict(reads)
        for read, values in known.held.items():
            hops = [known.signals[v].hops for v in values if v in known.signals]
            if hops:
                found[read] = Signal(min(max(hops), most), _starts_at_zero(ir, read))
        if found == reads:
            break
        reads = found
    while mixed := [r for r, s in reads.items() if s.pure and not _pure(known, known.held[r])]:
        reads.update({read: Signal(reads[read].hops, False) for read in mixed})
        _sweep(ir, known, reads)


def _sweep(ir: TrainingGraph, known: Derivation, reads: dict[fx.Node, Signal]) -> None:
    known.signals, known.doubtful = {}, []
    for node in ir.graph.nodes:
        signal = reads.get(node) or _signal(ir, node, known)
        if signal is not None:
            known.signals[node] = signal


def _pure(known: Derivation, values: list[fx.Node]) -> bool:
    return all(v in known.signals and known.signals[v].pure for v in values)


def _starts_at_zero(ir: TrainingGraph, read: fx.Node) -> bool:
    held = owned_tensor(ir.root, read.meta["state"] if "state" in read.meta else str(read.target))
    start = held.initial if isinstance(held, State) else held
    return isinstance(start, Tensor) and not bool(start.count_nonzero())


def _passes_layers(ir: TrainingGraph, gradient: fx.Node) -> bool:
    """Whether a node with parameters lies on the tape between a gradient's scalar and its leaf."""
    scalar, wrt = gradient.args
    assert isinstance(scalar, fx.Node)
    assert isinstance(wrt, fx.Node)
    below, todo = {wrt}, [wrt]
    while todo:  # everything that depends on the leaf and carries its tape
        for user in todo.pop().users:
            if user not in below and user.target not in (ops.stop_gradient, ops.gradient):
                below.add(user)
                todo.append(user)
    tape, todo = {scalar}, [scalar]
    while todo:
        node = todo.pop()
        if node.target is ops.stop_gradient or node is wrt:
            continue
        for source in node.all_input_nodes:
            if source not in tape:
                tape.add(source)
                todo.append(source)
    return any(_has_parameters(ir, node) for node in tape & below - {wrt})


def _has_parameters(ir: TrainingGraph, node: fx.Node) -> bool:
    if node_parameters(ir.root, node):
        return True
    return any(s.op == "get_attr" and node_parameters(ir.root, s) for s in node.all_input_nodes)


def _traits(
    ir: TrainingGraph, layered: set[fx.Node], earlier: dict[fx.Node, list[fx.Node]]
) -> dict[fx.Node, frozenset[str]]:
    found: dict[fx.Node, frozenset[str]] = {}
    before: dict[fx.Node, frozenset[str]] | None = None
    while found != before:
        before = dict(found)
        for node in ir.graph.nodes:
            sources = [*node.all_input_nodes, *earlier.get(node, ())]
            found[node] = _own(ir, node, layered).union(*(found.get(s, frozenset()) for s in sources))
    return found


def _own(ir: TrainingGraph, node: fx.Node, layered: set[fx.Node]) -> frozenset[str]:
    """Return the traits that a value has of itself."""
    mine: set[str] = set()
    if node is ir.target:
        mine.add("label")
    elif node.op == "placeholder":
        mine.add("input")
    if node_parameters(ir.root, node):
        mine.add("parameter")
    if node.target is ops.gradient:
        mine.add("gradient" if node in layered else "error")
    return frozenset(mine)


def _signal(ir: TrainingGraph, node: fx.Node, known: Derivation) -> Signal | None:
    if node.target is ops.gradient:
        scalar = node.args[0]
        assert isinstance(scalar, fx.Node)
        before = known.signals.get(scalar)
        return Signal((before.hops if before else 0) + int(node in known.layered), True)
    arriving = {s: known.signals[s] for s in node.all_input_nodes if s in known.signals}
    if not arriving:
        return None
    hops = max(s.hops for s in arriving.values())
    if node.target in (ops.stop_gradient, ops.objective):
        return next(iter(arriving.values()))
    if node.op == "call_module":
        module = owned_tensor(ir.root, str(node.target))
        return Signal(hops, False) if isinstance(module, _LINEAR_LAYERS) else None
    if node.op not in ("call_function", "call_method") or node.target is ops.assign:
        return None
    if all(s.pure for s in arriving.values()) and not _others(node, arriving):
        return Signal(hops, True)  # an image of the gradient alone: its sign, a clipped or scaled copy
    order = _probe(ir, node, set(arriving), known)
    if order is None:
        known.doubtful.append(node.name)
        return Signal(hops, False)
    linear, zero = order
    return Signal(hops, zero and all(s.pure for s in arriving.values())) if linear else None


def _others(node: fx.Node, arriving: dict[fx.Node, Signal]) -> bool:
    return any(s not in arriving for s in node.all_input_nodes) or len(arriving) > 1


def _probe(
    ir: TrainingGraph, node: fx.Node, moving: set[fx.Node], known: Derivation
) -> tuple[bool, bool] | None:
    """Try whether a node is affine in some of its arguments, and zero where they are.

    Returns None where it cannot be tried.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        try:
            fixed = {s: _sample(ir, s, known) for s in node.all_input_nodes}
            values = []
            for scale in (0.0, 1.0, 2.0):
                seen = {s: _scaled(v, scale) if s in moving else v for s, v in fixed.items()}
                values.append(_flat(_call(node, seen)))
        except Exception:  # any function may refuse made-up values
            return None
    zero, one, two = values
    if not one.numel():
        return True, True
    size = max(float(one.abs().max()), float(two.abs().max()), float(zero.abs().max()), 1e-12)
    bend = float((two - 2 * one + zero).abs().max())
    return bend <= 1e-4 * size, float(zero.abs().max()) <= 1e-6 * size


def _sample(ir: TrainingGraph, node: fx.Node, known: Derivation) -> Any:
    if node.op == "get_attr" and "state" not in node.meta:
        held = owned_tensor(ir.root, str(node.target))
        return held.detach() if isinstance(held, Tensor) else held
    if node is ir.target:
        if known.target is None:
            raise ValueError("no target is known")
        return known.target
    return torch.utils._pytree.tree_map(
        lambda spec: _draw(spec, known.batch), node.meta["spec"], is_leaf=lambda s: isinstance(s, TensorSpec)
    )


def _draw(spec: Any, batch: int) -> Any:
    if not isinstance(spec, TensorSpec):
        raise ValueError("a value without a spec")
    shape = spec.concrete(batch)
    return torch.randn(shape).to(spec.dtype) if spec.differentiable else torch.zeros(shape, dtype=spec.dtype)


def _scaled(value: Any, scale: float) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v * scale if isinstance(v, Tensor) else v, value)


def _call(node: fx.Node, seen: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg(node.args, seen.__getitem__), fx.map_arg(node.kwargs, seen.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _flat(value: Any) -> Tensor:
    found = [v.flatten().double() for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return torch.cat(found)


def _ranks(ir: TrainingGraph) -> dict[str, int]:
    forward = {name: owner.index for name, owner in ir.owners.items()}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(set(forward.values()))
    for node in ir.graph.nodes:
        for source in node.all_input_nodes:
            here, there = (forward.get(str(n.meta.get("owner"))) for n in (node, source))
            if here is not None and there is not None and here != there:
                graph.add_edge(there, here)
    if not nx.is_directed_acyclic_graph(graph):
        return forward
    order = {index: i for i, index in enumerate(nx.lexicographical_topological_sort(graph))}
    return {name: order[index] for name, index in forward.items()}
