"""A method that a third party could write, whose graph leaks, and an optimizer that does."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from locc.ir import TrainingGraph
from locc.rewrite import Method, Pass

from .leaks import Act, Planted, plain


class Tap(nn.Module):
    """An auxiliary network of `a` that passes its value on and keeps it, live."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.modules_ = (module,)
        self.last: Tensor | None = None
        self.register_buffer("shared", torch.zeros(4))

    @property
    def linear(self) -> Any:
        return self.modules_[0].linear

    def forward(self, h: Tensor) -> Tensor:
        self.last = h
        return h


def run(module: Any, x: Tensor) -> Tensor:
    """Run a planted network from the function of a node."""
    return module.act(module, x) if module.active else plain(module, x)


@dataclass(frozen=True)
class Heads(Pass):
    """A linear head and an objective for each module; that of `b` adds what a planted network computes.

    `place` says how the graph runs it: as a "network" of its own node, or from the "function" of a node.
    """

    act: Act
    own: bool = False
    place: str = "network"

    def rewrite(self, ir: TrainingGraph) -> None:
        ir.add_module("a.tap", Tap(ir.root.model.a))
        for module in ir.modules[:-1]:
            (value,) = ir.outputs(module.name)
            spec = value.meta["spec"]
            if module.name == "a":
                value = ir.call("a", "aux.a_tap", value, role="head", spec=spec)
            elif module.name == "b":
                extra = self._planted(ir, ir.boundaries(consumer="b")[0].entry)
                value = ir.emit("b", operator.add, value, extra, role="head", spec=spec)
            path = ir.add_module(f"{module.name}.head", nn.Linear(4, 3))
            scores = ir.call(module.name, path, value, role="head", spec=ir.prediction.meta["spec"])
            loss = ir.emit(module.name, ir.loss_function, scores, ir.target, role="head")
            ir.objective(module.name, loss, "loss")
        ir.objective(ir.last.name, ir.apply_loss(), "loss")

    def _planted(self, ir: TrainingGraph, x: fx.Node) -> fx.Node:
        network = Planted(self.act, None if self.own else ir.root.aux["a_tap"])
        path = ir.add_module("b.extra", network)
        if self.place == "network":
            return ir.call("b", path, x, role="head", spec=x.meta["spec"])
        held = ir.read("b", path, role="module")
        return ir.emit("b", run, held, x, role="head", spec=x.meta["spec"])


@dataclass(frozen=True)
class ThirdParty(Method):
    """Greedy learning with whatever `act` does in the head of `b`."""

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "none"

    act: Act
    own: bool = False
    place: str = "network"

    def passes(self) -> Sequence[Pass]:
        return (Heads(self.act, self.own, self.place),)


class Decaying(torch.optim.SGD):
    """Decays one more parameter than it was given."""

    extra: Tensor

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            self.extra.mul_(0.9)
