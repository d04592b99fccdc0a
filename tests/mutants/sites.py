"""What operators are written with: a registry, places in a graph, and small edits of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from locc.ir import TensorSpec, TrainingGraph, carry, ops
from locc.ir.captured import owned_tensor
from locc.runtime import Learner

from .order import ordered

Site = tuple[str, Callable[[], None]]
"""Where a mutation applies, in words, and what makes it."""

GraphOperator = Callable[[TrainingGraph], Iterator[Site]]
LearnerOperator = Callable[[TrainingGraph, dict[str, Learner]], Iterator[Site]]

GRAPH: dict[str, GraphOperator] = {}
"""Operators on the graph; the optimizers are built from the mutated graph, as `compile` would."""
LEARNER: dict[str, LearnerOperator] = {}
"""Operators on the optimizers of a clean graph."""


def on_graph(name: str) -> Callable[[GraphOperator], GraphOperator]:
    """Register an operator on the graph."""
    return lambda operator: GRAPH.setdefault(name, operator)


def on_learners(name: str) -> Callable[[LearnerOperator], LearnerOperator]:
    """Register an operator on the optimizers."""
    return lambda operator: LEARNER.setdefault(name, operator)


# ---- reading ---------------------------------------------------------------------------------


def owner_of(node: fx.Node) -> str:
    """Return a node's owner."""
    return str(node.meta.get("owner"))


def neighbours(ir: TrainingGraph, owner: str) -> list[str]:
    """Return the owners before and after one in the list of all, the last followed by the first."""
    names = list(ir.owners)
    i = names.index(owner)
    found = dict.fromkeys([names[(i + 1) % len(names)], names[i - 1]])
    return [name for name in found if name != owner]


def cuts(ir: TrainingGraph) -> list[fx.Node]:
    """Return the `stop_gradient` nodes."""
    return [n for n in ir.graph.nodes if n.target is ops.stop_gradient]


def calls(ir: TrainingGraph) -> list[fx.Node]:
    """Return the nodes that compute: neither leaves, nor the IR's own four ops."""
    return [
        n
        for n in ir.graph.nodes
        if n.op in ("call_function", "call_method", "call_module") and n.target not in (*ops.OPS, carry)
    ]


def number(node: Any) -> TensorSpec | None:
    """Return the spec of a node that holds one floating-point tensor."""
    spec = node.meta.get("spec") if isinstance(node, fx.Node) else None
    return spec if isinstance(spec, TensorSpec) and spec.differentiable else None


def after(node: fx.Node) -> set[fx.Node]:
    """Return a node and all that depends on it."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return seen


def abroad(ir: TrainingGraph, node: fx.Node, like: fx.Node) -> fx.Node | None:
    """Return a live value of another owner, shaped as `like`, that `node` can read without a circle."""
    later = after(node)
    region = node.meta.get("repeat")
    for other in calls(ir):
        fits = number(other) is not None and other.meta["spec"] == like.meta.get("spec")
        inside = other.meta.get("repeat") not in (None, region)
        if fits and not inside and owner_of(other) != owner_of(node) and other not in later:
            return other
    return None


def first(node: fx.Node) -> fx.Node:
    """Return the first argument: of an objective or a gradient, its scalar."""
    scalar = node.args[0]
    assert isinstance(scalar, fx.Node)
    return scalar


def parameters(ir: TrainingGraph, owner: str) -> list[tuple[str, nn.Parameter]]:
    """Return an owner's trained parameters, the smallest first, by path."""
    found = [(path, p) for path, p in ir.parameters(owner).items() if p.requires_grad]
    return sorted(found, key=lambda item: item[1].numel())


def held(ir: TrainingGraph, path: str) -> nn.Module | Tensor | None:
    """Return what is at a path."""
    return owned_tensor(ir.root, path)


# ---- writing ---------------------------------------------------------------------------------


def add(
    ir: TrainingGraph,
    owner: str,
    function: Callable[..., Any],
    *args: Any,
    like: fx.Node | None = None,
    **meta: Any,
) -> fx.Node:
    """Add a call; `arrange` finds its place. `like` gives spec and region."""
    end = next(iter(reversed(ir.graph.nodes)))
    with ir.graph.inserting_before(end):
        node: fx.Node = ir.graph.call_function(function, args)
    node.meta.update(
        owner=owner, role="compute", made_by="mutant", spec=like.meta.get("spec") if like else None
    )
    if like is not None and like.meta.get("repeat"):
        node.meta["repeat"] = like.meta["repeat"]
    node.meta.update(meta)
    return node


def read(ir: TrainingGraph, owner: str, path: str) -> fx.Node:
    """Add a read of a tensor."""
    with ir.graph.inserting_before(next(iter(ir.graph.nodes))):
        node: fx.Node = ir.graph.create_node("get_attr", path)
    node.meta.update(owner=owner, role="state", made_by="mutant", spec=None)
    return node


def substitute(ir: TrainingGraph, old: fx.Node, new: fx.Node) -> None:
    """Let everything that reads `old` read `new`."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    for name in ("output", "prediction", "loss"):
        if getattr(ir, name) is old:
            setattr(ir, name, new)
    for name, region in ir.repeats.items():
        pairs = tuple((entry, new if end is old else end) for entry, end in region.carried)
        ir.repeats[name] = replace(region, carried=pairs)


def reads(node: fx.Node, *args: Any) -> None:
    """Give a node other arguments."""
    node.args = args


def computes(node: fx.Node, function: Callable[..., Any]) -> None:
    """Give a node another function."""
    node.target = function


def put_after(ir: TrainingGraph, cut: fx.Node, function: Callable[..., Any], *args: Any) -> None:
    """Let the readers of a cut value read function(cut, *args) instead; a gradient keeps its leaf."""
    node = add(ir, owner_of(cut), function, cut, *args, like=cut)
    cut.replace_all_uses_with(node, delete_user_cb=lambda u: u is not node and u.target is not ops.gradient)


def uncut(ir: TrainingGraph, cut: fx.Node) -> None:
    """Drop a `stop_gradient`."""
    substitute(ir, cut, first(cut))
    ir.graph.erase_node(cut)


def arrange(ir: TrainingGraph) -> None:
    """Bring the nodes into a valid order near the old one.

    Raises:
        CycleError: there is none.
    """
    end = next(iter(reversed(ir.graph.nodes)))
    for (node,) in ordered(list(ir.graph.nodes), lambda n: n):
        if node is not end:
            end.prepend(node)


def placed(ir: TrainingGraph, path: str, module: nn.Module) -> None:
    """Put a module at a path of the root."""
    parent, _, last = path.rpartition(".")
    ir.root.get_submodule(parent)._modules[last] = module
