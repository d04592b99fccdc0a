"""`greedy-seq` and `cascade`: modules that train one after the other, each under a head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from locc.errors import MethodError
from locc.rewrite import (
    LOCAL_LOSS,
    POSITIONS,
    RANK,
    AttachHeads,
    LocalLoss,
    LossLike,
    Method,
    OptimizerSpec,
    OutputLoss,
    Pass,
    Recipe,
    option,
)
from locc_passes.proxy.terms import Stages


@dataclass(frozen=True)
class GreedySeq(Method):
    """Greedy layerwise training: stage by stage, each module under a small network, then frozen.

    Stage k trains f_k and its auxiliary network on the user's loss while f_1..f_{k-1} are frozen in eval mode
    and the later modules wait; `fit(epochs=E)` trains each stage for E epochs, the last on the network's own
    output. An auxiliary problem of k = depth + 1 layers counts as published: the trained one, `depth` of the
    auxiliary, pooling and a linear classifier. Belilovsky, Eickenberg & Oyallon, "Greedy layerwise learning
    can scale to ImageNet" (2019), and its released code; its ensemble of stages is not part of this.
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = (
        "Belilovsky, Eickenberg & Oyallon 2019, Greedy layerwise learning can scale to ImageNet"
    )
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("sgd", 0.1, {"momentum": 0.9, "weight_decay": 5e-4}),
        source="Belilovsky et al. 2019, released code for CIFAR-10; batches of 128, a fifth every 15 epochs",
        network="BatchNorm in every module",
    )

    depth: int = option(2, "layers of the auxiliary network before its classifier", range=(0, 3))
    width: int | None = option(
        None, "its channels (default: twice the boundary's)", range=(16, 2048), scale="log"
    )
    positions: float | None = option(None, **POSITIONS)
    rank: int | None = option(None, **RANK)
    local_loss: LossLike | None = option(None, **LOCAL_LOSS)

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise MethodError(f"depth={self.depth}: give 0 (a linear classifier) or more")
        if self.width is not None and self.width < 1:
            raise MethodError(f"width={self.width}: give at least 1")

    def passes(self) -> Sequence[Pass]:
        """Return the heads, their losses, the loss at the output, and the stages."""
        options = {"depth": self.depth, "width": self.width}
        heads = AttachHeads("greedy", options=options, positions=self.positions, rank=self.rank)
        return (heads, LocalLoss(self.local_loss), OutputLoss(), Stages())


@dataclass(frozen=True)
class Cascade(Method):
    """Deep cascade learning: stage by stage, each module under two dense layers with dropout, then frozen.

    As `greedy-seq`, with the temporary head flatten, 512, 256, classes. Marquez, Hare & Niranjan, "Deep
    cascade learning" (2018), and its released code.
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "Marquez, Hare & Niranjan 2018, Deep cascade learning"
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("sgd", 0.01, {"momentum": 0.9, "weight_decay": 1e-3}),
        source="Marquez et al. 2018, released code; batches of 64, a tenth on plateaus",
    )

    dropout: float = option(0.5, "of the temporary heads", range=(0.0, 0.9))
    dim_in_decoder: int = option(
        4096, "largest number of features that a temporary head reads", range=(64, 8192), scale="log"
    )
    positions: float | None = option(None, **POSITIONS)
    rank: int | None = option(None, **RANK)
    local_loss: LossLike | None = option(None, **LOCAL_LOSS)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise MethodError(f"dropout={self.dropout}: give a probability below 1")
        if self.dim_in_decoder < 1:
            raise MethodError(f"dim_in_decoder={self.dim_in_decoder}: give at least 1")

    def passes(self) -> Sequence[Pass]:
        """Return the heads, their losses, the loss at the output, and the stages."""
        options = {"dropout": self.dropout, "dim_in_decoder": self.dim_in_decoder}
        heads = AttachHeads("cascade", options=options, positions=self.positions, rank=self.rank)
        return (heads, LocalLoss(self.local_loss), OutputLoss(), Stages())
