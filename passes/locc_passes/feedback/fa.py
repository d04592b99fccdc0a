"""`fa`: feedback alignment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from locc.ir import TrainingGraph
from locc.rewrite import Given, GradientChain, Method, OutputLoss, Pass, Recipe, option
from locc_passes.feedback.layers import FeedbackLayers, opened
from locc_passes.feedback.published import RECIPE, advice
from locc_passes.feedback.zero import ZeroWeights


@dataclass(frozen=True)
class FA(Method):
    """Feedback alignment: errors go back through fixed random matrices instead of the weights.

    delta_k = (B_{k+1} delta_{k+1}) * sigma'(a_k), with B of the weight's shape, drawn once. The error at
    the output, and the Jacobians of nonlinearities, normalisation and pooling, are exact.
    """

    family: ClassVar[str] = "feedback"
    reference: ClassVar[str] = "Lillicrap, Cownden, Tweed & Akerman 2016"
    recipe: ClassVar[Recipe] = RECIPE

    init: str = option(
        "kaiming_uniform",
        "law of the feedback matrices: kaiming_ or xavier_, uniform or normal",
        choices=("kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"),
    )
    feedback: Given | None = option(
        None,
        "your own matrices: a dict by layer of tensors in the shape of its weight, or a factory "
        "(spec of the weight, the same again[, layer's name]) -> tensor",
    )
    zero_init: bool = option(
        False, "start all forward weights and biases at zero (for tanh and sigmoid networks)"
    )

    def opened(self, model: nn.Module, splits: Sequence[str]) -> Iterator[str]:
        """Yield the layers, and what multiplies with a weight of its own."""
        yield from opened(model)

    def passes(self) -> Sequence[Pass]:
        """Return the feedback layers, the loss and the chain."""
        start = (ZeroWeights(),) if self.zero_init else ()
        return (*start, FeedbackLayers(self.init, self.feedback), OutputLoss(), GradientChain())

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of ReLUs without normalisation."""
        yield from advice(ir)
