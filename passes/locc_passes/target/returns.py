"""Returns: networks that lead from later values back to one that was sent, and what they bring there."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from locc.ir import TrainingGraph

Moved = dict[fx.Node, fx.Node]
"""A value of the forward pass -> what stands for it: its target, or what noise has made of it."""


@dataclass(frozen=True)
class Return:
    """A network g that leads back to a value; an auxiliary owner holds it and trains it.

    Attributes:
        owner: the auxiliary.
        path: of the network.
        sources: the later values that it reads, in order.
    """

    owner: str
    path: str
    sources: tuple[fx.Node, ...]

    @property
    def module(self) -> str:
        """The module that the auxiliary serves."""
        return self.owner.rpartition(".")[0]

    def call(self, ir: TrainingGraph, values: tuple[fx.Node, ...]) -> fx.Node:
        """Return g(values), values of any owner, in the program of its own; one node for the same values."""
        inputs = tuple(ir.stop_gradient(self.owner, value) for value in values)
        for user in inputs[0].users:
            if user.op == "call_module" and user.target == self.path and user.args == inputs:
                return user
        return ir.call(self.owner, self.path, *inputs, role="inverse")


def returns(value: fx.Node) -> list[Return]:
    """Return the networks that lead back to a value, to which one may append."""
    found: list[Return] = value.meta.setdefault("returns", [])
    return found


def proposal(ir: TrainingGraph, back: Return, moved: Moved) -> fx.Node:
    """Return g(moved sources), in the program of the network's owner."""
    return back.call(ir, tuple(brought(ir, source, moved) for source in back.sources))


def difference(ir: TrainingGraph, back: Return, moved: Moved) -> fx.Node:
    """Return g(moved sources) - g(sources), in the program of the network's owner; one node for both."""
    there = proposal(ir, back, moved)
    here = back.call(ir, back.sources)
    for user in there.users:
        if user.target is operator.sub and user.args == (there, here):
            return user
    return ir.emit(back.owner, operator.sub, there, here, role="difference")


def brought(ir: TrainingGraph, value: fx.Node, moved: Moved) -> fx.Node:
    """Return what stands for a value: value + the sum of the differences that its returns bring.

    Found once for each value, and kept in `moved`; that begins with what is moved at the output. A value that
    is lifted from another one (`lift`) is lifted from what stands for that.
    """
    if value not in moved and "lifted" in value.meta:
        lifted = brought(ir, value.meta["lifted"], moved)
        moved[value] = ir.call(value.meta["owner"], str(value.target), lifted, role="lifted")
    elif value not in moved:
        owner = value.meta["owner"]
        total = ir.stop_gradient(owner, value)
        for back in returns(value):
            arriving = ir.stop_gradient(owner, difference(ir, back, moved))
            total = ir.emit(owner, operator.add, total, arriving, role="target")
        moved[value] = total
    return moved[value]


def lift(ir: TrainingGraph, value: fx.Node, path: str) -> fx.Node:
    """Return a fixed function of a value, computed once by its owner, that returns may read in its place."""
    node = ir.call(value.meta["owner"], path, value, role="lifted")
    node.meta["lifted"] = value
    return node
