"""Mutations of parameters, buffers and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc.ir import TrainingGraph, ops
from locc.runtime import Learner

from .sites import (
    Site,
    add,
    calls,
    held,
    neighbours,
    number,
    on_graph,
    on_learners,
    owner_of,
    parameters,
    placed,
    read,
)

# ---- shared between owners -------------------------------------------------------------------


@on_graph("call another owner's layer")
def _retarget(ir: TrainingGraph) -> Iterator[Site]:
    layers = [n for n in ir.graph.nodes if n.op in ("call_module", "get_attr")]
    for node in layers:
        for other in layers:
            if owner_of(other) in neighbours(ir, owner_of(node)) and node.op == other.op:
                mine, theirs = held(ir, str(node.target)), held(ir, str(other.target))
                if _form(mine) == _form(theirs):
                    yield f"{node.name} calls {other.target}", partial(setattr, node, "target", other.target)


def _form(found: Any) -> tuple[Any, ...]:
    """Return what two modules or tensors have in common that can stand for each other."""
    if isinstance(found, nn.Module):
        return type(found), tuple(tuple(p.shape) for p in found.parameters())
    return (tuple(found.shape),)


def _tie(name: str, tie: Callable[[nn.Parameter], nn.Parameter]) -> None:
    @on_graph(name)
    def _(ir: TrainingGraph) -> Iterator[Site]:
        for owner in ir.owners:
            for other in neighbours(ir, owner)[:1]:
                for path, p in parameters(ir, owner):
                    for there, q in parameters(ir, other):
                        if p.shape == q.shape:
                            yield f"{there} = {path}", partial(_tied, ir, path, there, tie)


def _tied(ir: TrainingGraph, path: str, there: str, tie: Callable[[nn.Parameter], nn.Parameter]) -> None:
    parent, _, last = there.rpartition(".")
    ir.root.get_submodule(parent)._parameters[last] = tie(ir.root.get_parameter(path))


def _offset(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter that begins at the last element of another one."""
    size = parameter.numel()
    flat = torch.rand(2 * size - 1)
    flat[:size] = parameter.detach().flatten()
    parameter.data = flat[:size].view(parameter.shape)
    return nn.Parameter(flat[size - 1 :].view(parameter.shape))


_tie("tie two owners' parameters", lambda p: p)
_tie("view another owner's parameter", lambda p: nn.Parameter(p.detach()))
_tie("overlap another owner's parameter", _offset)


class Peek(nn.Module):
    """A layer that keeps another owner's parameter where no module registers it."""

    def __init__(self, inner: nn.Module, other: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.other, self.name = inner, [other], name

    def __getattr__(self, name: str) -> Any:
        """Formulas read a layer's own weight and bias."""
        return super().__getattr__(name) if name in ("inner", "training") else getattr(self.inner, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(x * (1 + 0.1 * getattr(self.other[0], self.name).mean()), *args, **kwargs)


@on_graph("hide another owner's parameter in a layer")
def _hide(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.graph.nodes:
        if node.op == "call_module" and node.args and number(node.args[0]) is not None:
            for other in neighbours(ir, owner_of(node)):
                for path, _ in parameters(ir, other)[:1]:
                    yield f"{path} in {node.target}", partial(_hidden, ir, str(node.target), path)


def _hidden(ir: TrainingGraph, layer: str, path: str) -> None:
    parent, _, last = path.rpartition(".")
    placed(ir, layer, Peek(ir.root.get_submodule(layer), ir.root.get_submodule(parent), last))


@on_graph("put another activation into a layer")
def _activation(ir: TrainingGraph) -> Iterator[Site]:
    called = {str(n.target): n for n in ir.graph.nodes if n.op == "call_module"}
    for path in called:
        for name, module in ir.root.get_submodule(path).named_modules():
            if isinstance(module, (nn.Tanh, nn.ReLU, nn.GELU)):
                inside = f"{path}.{name}".rstrip(".")
                yield inside, partial(placed, ir, inside, nn.Softplus())


# ---- assignments -----------------------------------------------------------------------------


def _assign(ir: TrainingGraph, owner: str, path: str, reader: str) -> None:
    """Let `owner` set to zero what a node of `reader` reads at `path`."""
    state = read(ir, reader, path)
    seen = state if owner == reader else add(ir, owner, ops.stop_gradient, state)
    add(ir, owner, ops.assign, state, add(ir, owner, torch.zeros_like, seen), role="assign")


def _assigns(ir: TrainingGraph, path: str, home: str) -> Iterator[Site]:
    for owner in neighbours(ir, home):
        yield f"'{owner}' sets {path} of '{home}'", partial(_assign, ir, owner, path, home)
        yield f"'{owner}' sets {path} as its own", partial(_assign, ir, owner, path, owner)


@on_graph("assign to a foreign parameter")
def _assign_parameter(ir: TrainingGraph) -> Iterator[Site]:
    for owner in ir.owners:
        for path, _ in parameters(ir, owner)[:2]:
            yield from _assigns(ir, path, owner)


@on_graph("assign to a foreign buffer")
def _assign_buffer(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.graph.nodes:
        found = held(ir, str(node.target)) if node.op in ("call_module", "get_attr") else None
        if isinstance(found, nn.Module):
            for name in [n for n, b in found.named_buffers() if b.is_floating_point()][:2]:
                yield from _assigns(ir, f"{node.target}.{name}", owner_of(node))
        elif found is not None and not isinstance(found, nn.Parameter):
            yield from _assigns(ir, str(node.target), owner_of(node))


@on_graph("assign a foreign live value")
def _assign_live(ir: TrainingGraph) -> Iterator[Site]:
    for owner in ir.owners:
        for path, parameter in parameters(ir, owner)[:1]:
            for other in neighbours(ir, owner):
                for source in [n for n in calls(ir) if owner_of(n) == other and number(n)][:1]:
                    yield (
                        f"{path} = {source.name}",
                        partial(_assign_value, ir, owner, path, source, tuple(parameter.shape)),
                    )


def _assign_value(ir: TrainingGraph, owner: str, path: str, source: fx.Node, shape: tuple[int, ...]) -> None:
    add(ir, owner, ops.assign, read(ir, owner, path), add(ir, owner, fill, source, shape), role="assign")


def fill(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.mean().expand(shape)


# ---- optimizers ------------------------------------------------------------------------------


def _foreign(
    ir: TrainingGraph, learners: dict[str, Learner]
) -> Iterator[tuple[str, Learner, str, nn.Parameter]]:
    for owner, learner in learners.items():
        for other in neighbours(ir, owner):
            for path, parameter in parameters(ir, other)[:2]:
                yield owner, learner, path, parameter


def _holds(learner: Learner, extra: nn.Parameter) -> None:
    learner.optimizer = torch.optim.SGD([*learner.parameters, extra], lr=0.1, weight_decay=0.1)


@on_learners("optimizer: a foreign parameter")
def _foreign_parameter(ir: TrainingGraph, learners: dict[str, Learner]) -> Iterator[Site]:
    for owner, learner, path, parameter in _foreign(ir, learners):
        yield f"'{owner}' updates {path}", partial(_holds, learner, parameter)


@on_learners("optimizer: a view of a foreign parameter")
def _foreign_view(ir: TrainingGraph, learners: dict[str, Learner]) -> Iterator[Site]:
    for owner, learner, path, parameter in _foreign(ir, learners):
        yield f"'{owner}' updates {path}", partial(_holds, learner, nn.Parameter(parameter.detach()))


@on_learners("optimizer: clip and clear a foreign parameter")
def _foreign_cleared(ir: TrainingGraph, learners: dict[str, Learner]) -> Iterator[Site]:
    for owner, learner, path, parameter in _foreign(ir, learners):
        yield f"'{owner}' clears {path}", partial(learner.parameters.append, parameter)


@on_learners("optimizer: swap two owners'")
def _swap(ir: TrainingGraph, learners: dict[str, Learner]) -> Iterator[Site]:
    for owner, learner in learners.items():
        for other in neighbours(ir, owner)[:1]:
            if other in learners:
                swapped = {owner: learners[other], other: learner}
                yield f"'{owner}' and '{other}'", partial(learners.update, swapped)
