"""`dgl`: decoupled greedy learning, synchronous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from locc.errors import MethodError
from locc.nn import Factory
from locc.rewrite import (
    LAYOUT,
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


@dataclass(frozen=True)
class DGL(Method):
    """Decoupled greedy learning: each module trains on the user's loss of its own auxiliary head.

    Module k minimises loss(aux_k(f_k(sg h_{k-1})), y) over its own and its head's parameters, and passes
    sg h_k on; the last module's head is the network's own. Belilovsky, Eickenberg & Oyallon, "Decoupled
    greedy learning of CNNs" (2020), with the MLP-SR heads of the released code; the paper compares these with
    two others of that code, "mlp" and "cnn".
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "Belilovsky, Eickenberg & Oyallon 2020, Decoupled greedy learning of CNNs"

    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("sgd", 0.1, {"momentum": 0.9, "weight_decay": 5e-4}),
        source="Belilovsky et al. 2020, released code for CIFAR-10; batches of 128, a fifth every 15 epochs",
        network="BatchNorm in every module",
    )

    head: str | Factory = option(
        "auto",
        "the paper's mlp-sr (reduced maps, 1x1 convolutions, MLP), mlp (the same without "
        "convolutions) or cnn (two 3x3 convolutions at full size), or linear; each adapts to flat, "
        "sequence and image boundaries. auto: mlp-sr on images, as in the paper, and linear elsewhere. "
        "Cheaper where every position has many classes: sr (linear on a quarter of the positions), "
        "bottleneck (linear through a quarter of the width) and unembedding (the model's own last layer "
        "as it is, which the last module alone trains). "
        "From Python also a factory (boundary spec, output spec) -> module",
        choices=("auto", "mlp-sr", "mlp", "cnn", "linear", "sr", "bottleneck", "unembedding"),
    )
    positions: float | None = option(None, **POSITIONS)
    rank: int | None = option(None, **RANK)
    hidden: int = option(
        2048,
        "most units of a hidden linear layer of mlp-sr and mlp, otherwise four times the channels",
        range=(64, 8192),
        scale="log",
    )
    layout: str | None = option(None, **LAYOUT)
    local_loss: LossLike | None = option(None, **LOCAL_LOSS)

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise MethodError(f"hidden={self.hidden}: give at least 1")

    def passes(self) -> Sequence[Pass]:
        """Return heads, their losses, and the loss at the output."""
        bounded = {"hidden": self.hidden} if self.head in ("auto", "mlp-sr", "mlp") else {}
        heads = AttachHeads(self.head, self.layout, options=bounded, positions=self.positions, rank=self.rank)
        return (heads, LocalLoss(self.local_loss), OutputLoss())


@dataclass(frozen=True)
class DGLAsync(DGL):
    """Asynchronous decoupled greedy learning: `dgl` whose modules train at their own pace.

    Each module but the first keeps the last `buffer` batches that the module below has made, labels with
    them. In turns that are drawn at random a module trains on the newest of the batches that it has used
    least, and hands on what it makes of it; the first module reads the data. `slow` takes turns from a
    module, to study how little the others mind. Belilovsky, Eickenberg & Oyallon, "Decoupled greedy
    learning of CNNs" (2020), and the buffers of its released code. With `buffer=0` it is `dgl`.
    """

    schedule: ClassVar[str] = "replay"
