"""`bp`: end-to-end backpropagation, written in the IR of local learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from locc.rewrite import GradientChain, Method, OutputLoss, Pass


@dataclass(frozen=True)
class BP(Method):
    """End-to-end backpropagation: the baseline, and the test of the compiler.

    Each module receives the gradient of the loss from its readers and applies it as the objective
    <h, gradient>, which is the chain rule; every gradient equals that of `loss.backward()`.

    Beside `al`, which adds to what inference keeps, the baseline with as many parameters is
    `locc.compile(copy.deepcopy(program.network), "bp")`, of a program of `al` that has not trained yet.
    """

    family: ClassVar[str] = "baseline"
    reference: ClassVar[str] = "Rumelhart, Hinton & Williams 1986"
    ties: ClassVar[str] = "owner"  # trains the parameter on the gradients of all its uses, as autograd does

    def passes(self) -> Sequence[Pass]:
        """Return the loss and the chain."""
        return (OutputLoss(), GradientChain())
