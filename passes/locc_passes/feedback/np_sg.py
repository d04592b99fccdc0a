"""`np-sg`: feedback alignment whose matrices learn, from noise, what gradients they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from locc.errors import MethodError, nearest
from locc.ir import Phase, TrainingGraph
from locc.rewrite import GradientChain, Method, OptimizerSpec, OutputLoss, Pass, Recipe, option
from locc_passes.feedback.layers import FeedbackLayers, opened
from locc_passes.feedback.perturbation import LearnedFeedback, NodePerturbation

REDUCTIONS, SOLVERS = ("mean", "sum"), ("sgd", "least-squares")


@dataclass(frozen=True)
class Warmup(Pass):
    """Lets the feedback learn alone in the first passes over the data."""

    epochs: int

    def rewrite(self, ir: TrainingGraph) -> None:
        """Declare the phases."""
        feedback = tuple(name for name, owner in ir.owners.items() if owner.auxiliary)
        if self.epochs and feedback:
            before = Phase("warmup", feedback, self.epochs, warmup=True)
            ir.phases = (before, Phase("train", tuple(ir.owners)))


@dataclass(frozen=True)
class NPSG(Method):
    """Synthetic gradients from node perturbation: errors go back through matrices that learn from noise.

    As `fa`, delta_k = (B_{k+1} delta_{k+1}) * sigma'(a_k), computed in a pass without noise. A second pass
    adds noise xi_k of deviation c to what each layer reads, and from how it changes the loss L of each sample
    B_{k+1} learns what the gradient is there: it descends ||B_{k+1} delta_{k+1} - (L~ - L) xi_k / c^2||^2.
    The variance of that estimate grows with the number of units that have noise. With solver="least-squares"
    B is at each step what fits all steps before it best; it is zero at first, so warmup is worth its while.
    """

    family: ClassVar[str] = "feedback"
    reference: ClassVar[str] = (
        "Lansdell, Prakash & Kording 2020, Learning to solve the credit assignment problem"
    )
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("sgd", 0.016),
        {"feedback": OptimizerSpec("sgd", 0.008)},
        source="Lansdell et al. 2020, released code: 5e-4 for sums over batches of 32, here means of them "
        "(and the square's factor 2)",
    )

    noise: float = option(0.1, "deviation c of the noise (0.01 to 0.1)", range=(0.003, 0.3), scale="log")
    lr_scale: float = option(
        1.0,
        "multiplies the learning rate of the feedback, the recipe's or your optimizer's",
        range=(0.1, 100.0),
        scale="log",
    )
    warmup: int = option(
        0, "passes over the data in which the feedback learns alone, before the first", range=(0, 3)
    )
    init: str = option(
        "kaiming_uniform",
        "law of the feedback matrices at the start: kaiming_ or xavier_, uniform or normal",
        choices=("kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"),
    )
    solver: str = option(
        "sgd",
        "how the feedback learns: 'sgd', or 'least-squares' (linear layers) from all steps",
        choices=("sgd", "least-squares"),
    )
    gamma: float = option(
        0.1,
        "ridge of the least squares: what the sum of squared errors starts from, times I",
        range=(0.001, 10.0),
        scale="log",
    )
    reduction: str = option("mean", "'mean' or 'sum': how the loss joins the samples of a batch")

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise MethodError(f"reduction={self.reduction!r}; {nearest(str(self.reduction), REDUCTIONS)}")
        if self.solver not in SOLVERS:
            raise MethodError(f"solver={self.solver!r}; {nearest(str(self.solver), SOLVERS)}")
        if not (self.noise > 0 and self.lr_scale > 0 and self.gamma > 0 and self.warmup >= 0):
            raise MethodError(
                f"noise={self.noise!r}, lr_scale={self.lr_scale!r}, gamma={self.gamma!r}, "
                f"warmup={self.warmup!r}: give a deviation and factors above 0, and a number of passes"
            )

    def opened(self, model: nn.Module, splits: Sequence[str]) -> Iterator[str]:
        """Yield the layers, and what multiplies with a weight of its own."""
        yield from opened(model)

    def passes(self) -> Sequence[Pass]:
        """Return the feedback layers and their matrices, the loss, the chain, and what the matrices learn."""
        solved = self.solver == "least-squares"
        return (
            FeedbackLayers(self.init),
            LearnedFeedback(self.lr_scale, solved),
            OutputLoss(),
            GradientChain(),
            NodePerturbation(self.noise, self.reduction == "mean", self.gamma if solved else None),
            Warmup(self.warmup),
        )
