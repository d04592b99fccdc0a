"""`al`: associated learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from locc.nn import Factory
from locc.rewrite import CLASS_IDS, NUMBERS, Method, OptimizerSpec, Pass, Recipe
from locc_passes.associated.fold import Bridges, LabelStream, MergeMiddle


@dataclass(frozen=True)
class AL(Method):
    """Associated learning: folds the network, so that each lower module meets an encoding of the label.

    Of Q modules the first K = Q // 2 are the encoders f_i of the input and the last K, from the end, the
    decoders h_i of the label; label encoders g_i and bridges b_i are auxiliary. A middle module is the
    top bridge. Without one, or behind one that gives a map, an auxiliary bridge becomes part of the network.
    Component i has two owners: f_i with b_i, and h_i with g_i. Inference is
    h_1(..h_K(b_K(f_K(..f_1(x))))), and its output are scores whose sigmoids were trained: the user's loss
    serves only to evaluate.
    """

    family: ClassVar[str] = "associated"
    reference: ClassVar[str] = "Kao & Chen 2021"
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("adam", 1e-4),
        source="Kao & Chen 2021, released code: label encoders and decoders at twice the rate (label_lr)",
        network="ELUs, without BatchNorm but in residual networks",
    )
    target: ClassVar[tuple[str, ...]] = (CLASS_IDS, NUMBERS)

    label_lr: float = field(
        default=2.0,
        metadata={
            "help": "learning rate of label encoders and decoders, in units of the others'",
            "range": (0.2, 20.0),
            "scale": "log",
        },
    )
    expansion: float = field(
        default=5.0,
        metadata={
            "help": "width of a bridge's hidden layer, in units of its output",
            "range": (0.5, 10.0),
            "scale": "log",
        },
    )
    bridge: Factory | None = field(
        default=None, metadata={"help": "(activation's spec, label encoding's spec) -> bridge"}
    )
    encoder: Factory | None = field(
        default=None, metadata={"help": "(label encoding's spec, next encoding's spec) -> label encoder"}
    )

    def __post_init__(self) -> None:
        for name in ("label_lr", "expansion"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")

    def passes(self) -> Sequence[Pass]:
        """Return the fold, the label side and the input side."""
        return (MergeMiddle(), LabelStream(self.label_lr, self.encoder), Bridges(self.expansion, self.bridge))
