"""Mutations of what is read: a `stop_gradient`, or any other edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from locc.ir import TrainingGraph, ops

from .sites import (
    Site,
    abroad,
    add,
    calls,
    computes,
    cuts,
    first,
    number,
    on_graph,
    owner_of,
    put_after,
    uncut,
)


def identity(x: Tensor) -> Tensor:
    return x


def view(x: Tensor) -> Tensor:
    return x.view_as(x)


def straight_through(cut: Tensor, live: Tensor) -> Tensor:
    """The cut value in forward, the live one in backward."""
    return cut + (live - live.detach())


@on_graph("drop a stop_gradient")
def _drop(ir: TrainingGraph) -> Iterator[Site]:
    for cut in cuts(ir):
        yield cut.name, partial(uncut, ir, cut)


def _instead(name: str, function: Callable[..., Any]) -> None:
    @on_graph(f"stop_gradient -> {name}")
    def _(ir: TrainingGraph) -> Iterator[Site]:
        for cut in cuts(ir):
            yield cut.name, partial(computes, cut, function)


_instead("identity", identity)
_instead("clone", torch.clone)
_instead("view", view)
_instead("detach", torch.detach)


@on_graph("straight-through around a stop_gradient")
def _straight(ir: TrainingGraph) -> Iterator[Site]:
    for cut in cuts(ir):
        yield cut.name, partial(put_after, ir, cut, straight_through, first(cut))


@on_graph("let a stop_gradient's reader read past it")
def _read_past(ir: TrainingGraph) -> Iterator[Site]:
    for cut in cuts(ir):
        for user in cut.users:
            if user.target not in (ops.gradient, ops.stop_gradient) and len(cut.users) > 1:
                yield f"{user.name} past {cut.name}", partial(user.replace_input_with, cut, first(cut))


@on_graph("change a boundary value in place")
def _in_place(ir: TrainingGraph) -> Iterator[Site]:
    for cut in ir.nodes(role="boundary"):
        if number(cut) is not None:
            yield cut.name, partial(put_after, ir, cut, torch.Tensor.mul_, 2.0)


@on_graph("copy a cut value")
def _copy(ir: TrainingGraph) -> Iterator[Site]:
    for cut in cuts(ir):
        yield cut.name, partial(put_after, ir, cut, torch.clone)


def _strangers(ir: TrainingGraph) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Yield every edge, reader first, with a live value of another owner that fits in."""
    for node in calls(ir):
        for source in node.all_input_nodes:
            other = abroad(ir, node, source)
            if other is not None:
                yield node, source, other


@on_graph("reroute an edge to a foreign live value")
def _reroute(ir: TrainingGraph) -> Iterator[Site]:
    for node, source, other in _strangers(ir):
        yield (
            f"{node.name}: {source.name} -> {other.name}",
            partial(node.replace_input_with, source, other),
        )


@on_graph("reroute an edge to a foreign value, cut")
def _reroute_cut(ir: TrainingGraph) -> Iterator[Site]:
    for node, source, other in _strangers(ir):
        yield (
            f"{node.name}: {source.name} -> {other.name}",
            partial(_between, ir, node, source, ops.stop_gradient, other),
        )


@on_graph("add a foreign live value to an edge")
def _mix_in(ir: TrainingGraph) -> Iterator[Site]:
    for node, source, other in _strangers(ir):
        yield (
            f"{node.name}: {source.name} + {other.name}",
            partial(_between, ir, node, source, torch.add, source, other),
        )


@on_graph("cut an edge inside an owner")
def _cut_inside(ir: TrainingGraph) -> Iterator[Site]:
    for node in calls(ir):
        for source in node.all_input_nodes:
            if owner_of(source) == owner_of(node) and number(source) and source.op != "get_attr":
                yield (
                    f"{node.name}: {source.name}",
                    partial(_between, ir, node, source, ops.stop_gradient, source),
                )


def _between(
    ir: TrainingGraph, node: fx.Node, source: fx.Node, function: Callable[..., Any], *args: fx.Node
) -> None:
    """Let `node` read function(*args) in the place of `source`."""
    made = add(ir, owner_of(node), function, *args, like=source)
    made.meta["repeat"] = node.meta.get("repeat")
    node.replace_input_with(source, made)


@on_graph("double a number")
def _double(ir: TrainingGraph) -> Iterator[Site]:
    for node in calls(ir):
        for i, value in enumerate(node.args):
            if isinstance(value, float):
                yield f"{node.name}: {value}", partial(node.update_arg, i, 2 * value)
        for key, value in node.kwargs.items():
            if isinstance(value, float):
                yield f"{node.name}: {key}", partial(node.update_kwarg, key, 2 * value)


@on_graph("put another function under the same name")
def _namesake(ir: TrainingGraph) -> Iterator[Site]:
    for node in calls(ir):
        if node.op == "call_function" and number(node) is not None:
            yield node.name, partial(computes, node, _halved(node.target))


def _halved(function: Any) -> Callable[..., Any]:
    def halved(*args: Any, **kwargs: Any) -> Any:
        return 0.5 * function(*args, **kwargs)

    halved.__name__ = getattr(function, "__name__", "halved")
    return halved
