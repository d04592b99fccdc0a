"""Methods made of one function, for tests of what a graph can say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from locc.ir import TrainingGraph
from locc.rewrite import Method, Pass


@dataclass(frozen=True)
class _Rule(Pass):
    function: Callable[[TrainingGraph], Any]

    def rewrite(self, ir: TrainingGraph) -> None:
        self.function(ir)


@dataclass(frozen=True)
class Rule(Method):
    """The method that rewrites the graph with a function."""

    family: ClassVar[str] = "test"
    reference: ClassVar[str] = "none"
    function: Callable[[TrainingGraph], Any]

    def passes(self) -> Sequence[Pass]:
        return (_Rule(self.function),)


def written(function: Callable[[TrainingGraph], Any]) -> Rule:
    """The method that does so, and gives the last module the user's loss."""

    def whole(ir: TrainingGraph) -> None:
        function(ir)
        ir.objective(ir.last.name, ir.apply_loss(), "loss")

    return Rule(whole)


def mean_square(h: Tensor) -> Tensor:
    return h.square().mean()


def sent(ir: TrainingGraph, owner: str) -> fx.Node:
    """The one value that a module sends."""
    (value,) = ir.outputs(owner)
    return value


def finish(ir: TrainingGraph, *done: str) -> None:
    """Give the modules that have no objective yet one that says little: mean square, or the user's loss."""
    for module in ir.modules:
        if module.name in done:
            continue
        if module is ir.last:
            ir.objective(module.name, ir.apply_loss(), "loss")
        else:
            value = sent(ir, module.name)
            ir.objective(module.name, ir.emit(module.name, mean_square, value), "size")


def repeat(ir: TrainingGraph, name: str, before: set[fx.Node]) -> None:
    """Put what was emitted since `before` into a repeated region."""
    for node in ir.graph.nodes:
        if node not in before and node.op != "get_attr":
            node.meta["repeat"] = name
