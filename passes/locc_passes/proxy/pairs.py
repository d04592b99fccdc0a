"""`pair-proxy` and `kernel-pull`: modules that part the classes, judged by kernels of pairs of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from locc.errors import MethodError, nearest
from locc.ir import TrainingGraph
from locc.nn import FEATURES, PAIR_OBJECTIVES, gaussian_kernel, matrix_loss, pair_kernel, pair_loss
from locc.rewrite import CLASS_IDS, Method, OptimizerSpec, OutputLoss, Pass, Recipe, ending, option
from locc_passes.proxy.terms import PairTerm, Stages

ORDERS = ("stages", "together")
ENDINGS: dict[str, tuple[object, ...]] = {
    "identity": (nn.Tanh, torch.tanh, nn.functional.tanh, "tanh"),
    "positive": (nn.Sigmoid, torch.sigmoid, nn.functional.sigmoid, "sigmoid"),
}
"""Ends of a module after which phi is another than relu."""

MATRIX_LOSSES = ("cosine", "mse")


class PairLoss:
    """`locc.nn.pair_loss` of the features of a value."""

    def __init__(self, objective: str, feature: str, pool: int, pull: bool) -> None:
        self.objective, self.feature, self.pool, self.pull = objective, feature, pool, pull
        self.__name__ = self.__qualname__ = "pair_loss"

    def __call__(self, g: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, shape []."""
        kernel = pair_kernel(g, self.feature, self.pool)
        return pair_loss(kernel, labels, self.objective, FEATURES[self.feature][1], self.pull)


class MatrixLoss:
    """`locc.nn.matrix_loss` of the Gaussian kernel of a value."""

    def __init__(self, objective: str, sigma: float) -> None:
        self.objective, self.sigma = objective, sigma
        self.__name__ = self.__qualname__ = "matrix_loss"

    def __call__(self, g: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, shape []."""
        return matrix_loss(gaussian_kernel(g, self.sigma), labels, self.objective)


@dataclass(frozen=True)
class FeaturePairs(PairTerm):
    """`PairLoss` of each value, by the fields of `PairProxy`."""

    objective: str = "alignment"
    feature: str = "auto"
    pool: int = 4
    pull: bool = True

    def loss(self, ir: TrainingGraph, value: fx.Node) -> PairLoss:
        """Return the loss, with the features that suit the end of the module."""
        feature = self.feature
        if feature == "auto":
            end = ending(value, ir.root)
            feature = next((name for name, ends in ENDINGS.items() if end in ends), "relu")
        objective = self.objective
        if objective == "auto":
            objective = "alignment" if self.pull else "nmse"
        return PairLoss(objective, feature, self.pool, self.pull)


@dataclass(frozen=True)
class MatrixPairs(PairTerm):
    """`MatrixLoss` of each value, by the fields of `KernelPull`."""

    objective: str = "cosine"
    sigma: float = 0.5

    def loss(self, ir: TrainingGraph, value: fx.Node) -> MatrixLoss:
        """Return the loss."""
        return MatrixLoss(self.objective, self.sigma)


@dataclass(frozen=True)
class PairProxy(Method):
    """Modular training with kernels: hidden modules need only know which samples are of one class.

    A split should stand where a module's output g is *before* its nonlinearity phi, with which the next
    module begins. The proxy objective compares K_ij, the cosine of phi(g_i) and phi(g_j), with 1 for
    two samples of one class and the least possible cosine for others (`locc.nn.pair_loss`). Modules train one
    after the other, to the end, and freeze; the last has the user's loss. Duan, Yu & Principe, "Modularizing
    deep learning via pairwise learning with kernels" (2022), and its released code. The published classifier
    reads normalised features; here it is the network's own. Batches should hold several samples of a class.
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = (
        "Duan, Yu & Principe 2022, Modularizing deep learning via pairwise learning with kernels"
    )
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("sgd", 0.1, {"momentum": 0.9, "weight_decay": 6.25e-5}),
        source="Duan et al. 2022, released code for CIFAR-10: batches of 128, 200 epochs, then slower",
    )
    target: ClassVar[tuple[str, ...]] = (CLASS_IDS,)

    objective: str = option(
        "auto",
        "what is compared of K and its target; auto: alignment, without pull nmse",
        choices=("auto", *PAIR_OBJECTIVES),
    )
    feature: str = option(
        "auto",
        "phi, the nonlinearity after a cut; auto: relu, and none after a module that ends in a "
        "tanh or a sigmoid",
        choices=("auto", *FEATURES),
    )
    pool: int = option(4, "side of the windows in which phi(g) of a map is averaged", range=(1, 8))
    pull: bool = option(True, "bring samples of one class together, too (not only others apart)")
    order: str = option(
        "stages", "stages: one module after the other, as published; together: all", choices=ORDERS
    )

    def __post_init__(self) -> None:
        for name, choices in (
            ("objective", ("auto", *PAIR_OBJECTIVES)),
            ("feature", ("auto", *FEATURES)),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in choices:
                raise MethodError(
                    f"{name}={getattr(self, name)!r}; {nearest(str(getattr(self, name)), choices)}"
                )
        if self.pool < 1:
            raise MethodError(f"pool={self.pool}: give at least 1")
        if not self.pull and self.objective == "alignment" and self.feature not in ("tanh", "identity"):
            raise MethodError(
                f"objective='alignment' without pull is undefined for feature='{self.feature}', whose least "
                "cosine may be 0; choose 'nmse', 'contrastive' or 'raw', or feature='tanh'"
            )

    def passes(self) -> Sequence[Pass]:
        """Return the proxy objectives, the loss at the output, and the stages."""
        order = (Stages(),) if self.order == "stages" else ()
        return (
            FeaturePairs(
                "pairs", objective=self.objective, feature=self.feature, pool=self.pool, pull=self.pull
            ),
            OutputLoss(),
            *order,
        )


@dataclass(frozen=True)
class KernelPull(Method):
    """Kernel networks' layerwise training: samples of one class are pulled together, others pushed apart.

    The whole matrix of Gaussian kernels between the rows of a module's output is brought to 1 for samples of
    one class and 0 for others (`locc.nn.matrix_loss`), module after module, the others frozen. Duan et al.,
    "On kernel method-based connectionist models and supervised deep learning without backpropagation" (2020),
    and its released code, whose layers are kernel machines with a kernel of fixed width: here they are the
    network's own, and the width is a share of the rows' spread, so that no scale of theirs lowers the loss.
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = (
        "Duan et al. 2020, On kernel method-based connectionist models and supervised deep learning without "
        "backpropagation"
    )
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("adam", 1e-3), source="Duan et al. 2020, released code: Adam; the rate is locc's own"
    )
    target: ClassVar[tuple[str, ...]] = (CLASS_IDS,)

    objective: str = option("cosine", "how the matrices are compared", choices=MATRIX_LOSSES)
    sigma: float = option(
        0.5,
        "width of the kernel, in units of the root mean square distance of two rows (locc's own)",
        range=(0.1, 10.0),
        scale="log",
    )

    def __post_init__(self) -> None:
        if self.objective not in MATRIX_LOSSES:
            raise MethodError(f"objective={self.objective!r}; {nearest(self.objective, MATRIX_LOSSES)}")
        if not self.sigma > 0:
            raise MethodError(f"sigma={self.sigma}: give a width above 0")

    def passes(self) -> Sequence[Pass]:
        """Return the objectives, the loss at the output, and the stages."""
        return (MatrixPairs("pairs", objective=self.objective, sigma=self.sigma), OutputLoss(), Stages())
