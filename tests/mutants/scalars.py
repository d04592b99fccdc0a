"""Mutations of objectives and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, fx

from locc.ir import TrainingGraph, ops

from .sites import (
    Site,
    add,
    calls,
    computes,
    cuts,
    first,
    neighbours,
    number,
    on_graph,
    owner_of,
    reads,
    substitute,
    uncut,
)


def total(x: Tensor) -> Tensor:
    return (x * x).sum()


def on_tape(scalar: Tensor, wrt: Tensor) -> Tensor:
    """A value in the shape of a gradient that carries the scalar's tape."""
    return scalar * torch.ones_like(wrt)


# ---- objectives ------------------------------------------------------------------------------


def _name(objective: fx.Node) -> str:
    return str(objective.meta["objective"])


def _with_neighbours(ir: TrainingGraph, nodes: list[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield each node with each objective of a neighbouring owner."""
    for node in nodes:
        for owner in neighbours(ir, owner_of(node)):
            for other in ir.objectives(owner):
                yield node, other


@on_graph("merge two objectives")
def _merge(ir: TrainingGraph) -> Iterator[Site]:
    for node, other in _with_neighbours(ir, ir.objectives()):
        yield f"{_name(node)} + {_name(other)}", partial(_plus, ir, node, first(other), cut=False)


@on_graph("merge two objectives, the other one cut")
def _merge_cut(ir: TrainingGraph) -> Iterator[Site]:
    for node, other in _with_neighbours(ir, ir.objectives()):
        yield f"{_name(node)} + {_name(other)}", partial(_plus, ir, node, first(other), cut=True)


def _plus(ir: TrainingGraph, node: fx.Node, other: fx.Node, *, cut: bool) -> None:
    owner = owner_of(node)
    term = add(ir, owner, ops.stop_gradient, other) if cut else other
    reads(node, add(ir, owner, torch.add, first(node), term, like=first(node)))


@on_graph("duplicate an objective under another owner")
def _duplicate(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.objectives():
        for other in neighbours(ir, owner_of(node)):
            yield f"{_name(node)} for '{other}'", partial(_again, ir, first(node), other, 1.0)


@on_graph("repeat an objective")
def _repeat(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.objectives():
        for factor in (1.0, 0.5):
            yield f"{_name(node)} x {factor}", partial(_again, ir, first(node), owner_of(node), factor)


def _again(ir: TrainingGraph, scalar: fx.Node, owner: str, factor: float) -> None:
    if factor != 1.0:
        scalar = add(ir, owner, torch.mul, scalar, factor, like=scalar)
    add(ir, owner, ops.objective, scalar, role="objective", objective=f"{owner}.mutant")


@on_graph("scale an objective")
def _scale(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.objectives():
        yield _name(node), partial(_scaled, ir, node)


def _scaled(ir: TrainingGraph, node: fx.Node) -> None:
    reads(node, add(ir, owner_of(node), torch.mul, first(node), -2.0, like=first(node)))


@on_graph("drop an objective")
def _drop(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.objectives():
        yield _name(node), partial(ir.graph.erase_node, node)


@on_graph("move an objective to a foreign scalar")
def _abroad(ir: TrainingGraph) -> Iterator[Site]:
    for node, other in _with_neighbours(ir, ir.objectives()):
        yield f"{_name(node)} of {first(other).name}", partial(reads, node, first(other))


@on_graph("make a foreign activation an objective")
def _activation(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.objectives():
        for owner in neighbours(ir, owner_of(node)):
            for value in [n for n in calls(ir) if owner_of(n) == owner and number(n)][:2]:
                yield f"{_name(node)} of {value.name}", partial(_of_total, ir, node, value)


def _of_total(ir: TrainingGraph, node: fx.Node, value: fx.Node) -> None:
    reads(node, add(ir, owner_of(node), total, value, like=first(node)))


# ---- gradients -------------------------------------------------------------------------------


def _leaf(gradient: fx.Node) -> fx.Node:
    leaf = gradient.args[1]
    assert isinstance(leaf, fx.Node)
    return leaf


@on_graph("gradient -> its live leaf")
def _leaf_instead(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.gradients():
        yield node.name, partial(substitute, ir, node, _leaf(node))


@on_graph("gradient -> a computation on the tape")
def _tape_instead(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.gradients():
        yield node.name, partial(computes, node, on_tape)


@on_graph("gradient -> a computation on the tape, imported live")
def _live(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.gradients():
        for cut in [u for u in node.users if u.target is ops.stop_gradient]:
            yield f"{node.name} at {cut.name}", partial(_imported, ir, node, cut)


def _imported(ir: TrainingGraph, node: fx.Node, cut: fx.Node) -> None:
    computes(node, on_tape)
    uncut(ir, cut)


@on_graph("gradient of a foreign scalar")
def _of_foreign(ir: TrainingGraph) -> Iterator[Site]:
    for node, other in _with_neighbours(ir, ir.gradients()):
        yield f"{node.name} of {first(other).name}", partial(reads, node, first(other), _leaf(node))


@on_graph("gradient by a foreign leaf")
def _by_foreign(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.gradients():
        for cut in cuts(ir):
            if owner_of(cut) in neighbours(ir, owner_of(node)) and cut.meta["spec"] == node.meta["spec"]:
                yield f"{node.name} by {cut.name}", partial(reads, node, first(node), cut)


@on_graph("zero a gradient")
def _zero(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.gradients():
        yield node.name, partial(_zeroed, ir, node)


def _zeroed(ir: TrainingGraph, node: fx.Node) -> None:
    substitute(ir, node, add(ir, owner_of(node), torch.zeros_like, _leaf(node), like=node))
    ir.graph.erase_node(node)


@on_graph("swap gradient and stop_gradient")
def _swap(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.gradients():
        yield node.name, partial(_becomes, node, ops.stop_gradient, _leaf(node))
    for cut in cuts(ir):
        for objective in ir.objectives(owner_of(cut)):
            # The gradient of the owner's objective by what the cut let in, in the place of the cut.
            yield (
                f"{cut.name} of {_name(objective)}",
                partial(_becomes, cut, ops.gradient, first(objective), first(cut)),
            )


def _becomes(node: fx.Node, op: object, *args: fx.Node) -> None:
    assert callable(op)
    computes(node, op)
    reads(node, *args)
