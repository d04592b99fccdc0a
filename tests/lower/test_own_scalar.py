"""A gradient is that of its own scalar, whatever else the step back-propagates through the same values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

import support
from locc import Method, Pass
from locc.ir import TrainingGraph, inner
from locc.rewrite import OutputLoss
from locc.testing import assert_lowered


@dataclass(frozen=True)
class Sum(Pass):
    """The last module has another objective, whose backward pass comes first."""

    def rewrite(self, ir: TrainingGraph) -> None:
        ir.objective(ir.last.name, ir.emit(ir.last.name, torch.sum, ir.prediction), "sum")


@dataclass(frozen=True)
class OfTheLoss(Pass):
    """The first module descends the gradient of the loss alone."""

    def rewrite(self, ir: TrainingGraph) -> None:
        (boundary,) = ir.boundaries()
        found = ir.stop_gradient(boundary.producer, ir.gradient(ir.loss, boundary.entry))
        ir.objective(boundary.producer, ir.emit(boundary.producer, inner, boundary.value, found), "chain")


@dataclass(frozen=True)
class Partial(Method):
    family: ClassVar[str] = "baseline"
    reference: ClassVar[str] = "a test"

    def passes(self) -> Sequence[Pass]:
        return (Sum(), OutputLoss(), OfTheLoss())


def test_a_gradient_is_that_of_its_own_objective() -> None:
    x, y = support.batch(dtype=torch.float64)
    model, other = support.mlp().double(), support.mlp().double()
    other.load_state_dict(model.state_dict())
    program = support.compiled(model, Partial(), ["relu2"], optimizer=support.sgd())
    assert_lowered(program, x, y)
    torch.nn.functional.cross_entropy(other(x), y).backward()
    program.step(x, y)
    wanted = other.first.weight - 0.1 * other.first.weight.grad
    torch.testing.assert_close(model.first.weight, wanted, rtol=0, atol=1e-12)
