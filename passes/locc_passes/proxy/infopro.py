"""`infopro`: modules that keep the information of their input while they learn the task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from locc.errors import MethodError, nearest
from locc.ir import BatchDim, TensorSpec, TrainingGraph
from locc.nn import build_decoder, build_head, supervised_contrast
from locc.rewrite import (
    CLASS_IDS,
    LOCAL_LOSS,
    POSITIONS,
    RANK,
    AttachHeads,
    LossLike,
    Method,
    OptimizerSpec,
    OutputLoss,
    Pass,
    Recipe,
    option,
    own_target,
)
from locc_passes.proxy.terms import HeadTerm, LocalTerm, one_label_a_row

TASKS = ("softmax", "contrast")


class ImageLoss:
    """The distance of a decoded input to the input: cross-entropy of [0, 1], or the mean square."""

    def __init__(self, mean: Sequence[float] | float | None, std: Sequence[float] | float | None) -> None:
        self.mean, self.std = mean, std
        self.bounded = mean is not None and std is not None
        self.__name__ = self.__qualname__ = "reconstruction_loss"

    def __call__(self, decoded: Tensor, x: Tensor) -> Tensor:
        """Return the loss, shape []."""
        if not self.bounded:
            return F.mse_loss(decoded, x)
        image = x * self._like(self.std, x) + self._like(self.mean, x)
        return F.binary_cross_entropy(decoded, image.clamp(0, 1))

    @staticmethod
    def _like(value: Sequence[float] | float | None, x: Tensor) -> Tensor:
        """Bring one number, or one for each channel, to the dimensions of an image."""
        found = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        return found if found.dim() == 0 else found.reshape(-1, *[1] * (x.dim() - 2))


@dataclass(frozen=True)
class Reconstruction(LocalTerm):
    """The distance of what a decoder makes of a value to the model's first floating-point input."""

    name: str = "reconstruction"
    loss: ImageLoss = field(default_factory=lambda: ImageLoss(None, None))
    width: int = 12

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """There is an input to reconstruct."""
        yield from LocalTerm.requires(self, ir)
        if _image(ir) is None:
            kinds = ", ".join(str(node.meta["spec"]) for node in ir.inputs)
            yield (
                f"the model reads {kinds}, and there is no floating-point input to reconstruct; use another "
                "method, or give the embedding as the model's input"
            )

    def term(self, ir: TrainingGraph, owner: str, value: fx.Node) -> fx.Node:
        """Return the loss of the decoder's result."""
        image = _image(ir)
        assert image is not None
        return ir.emit(
            owner,
            self.loss,
            self.network(ir, owner, value, partial(self._decoder, image)),
            image,
            role="term",
        )

    def _decoder(self, image: fx.Node, spec: TensorSpec, _: TensorSpec, **options: object) -> nn.Module:
        target, bounded = image.meta["spec"], self.loss.bounded
        return build_decoder(spec, target, bounded=bounded, width=self.width, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Contrast(LocalTerm):
    """The supervised contrast of a head's features."""

    single: ClassVar[bool] = True

    name: str = "contrast"
    features: int = 128
    temperature: float = 0.07

    def refusal(self, ir: TrainingGraph, value: fx.Node) -> str | None:
        """Each sample has one row and one label."""
        return one_label_a_row(ir, value)

    def term(self, ir: TrainingGraph, owner: str, value: fx.Node) -> fx.Node:
        """Return the contrast of the head's result."""
        z = self.network(ir, owner, value, self._head)
        return ir.emit(
            owner,
            supervised_contrast,
            z,
            own_target(ir, owner),
            self.temperature,
            role="term",
            spec=ir.scalar,
        )

    def _head(self, spec: TensorSpec, output: TensorSpec, **options: object) -> nn.Module:
        result = TensorSpec((BatchDim(), self.features), output.dtype)
        return build_head(spec, result, "infopro", **options)  # type: ignore[arg-type]


def _image(ir: TrainingGraph) -> fx.Node | None:
    found = (n for n in ir.inputs if isinstance(n.meta["spec"], TensorSpec))
    return next((n for n in found if n.meta["spec"].dtype.is_floating_point), None)


@dataclass(frozen=True)
class InfoPro(Method):
    """InfoPro: each module reconstructs the input and solves the task, in a ratio that shifts with depth.

    Module k < K minimises lambda1_k R + lambda2_k T: R is the distance of decoder(h_k) to the model's input,
    T the user's loss of a head (task="softmax") or the supervised contrast of its features
    (task="contrast"); both weights are linear in k. The last module has the user's loss. As published, R is
    the binary cross-entropy with the image in [0, 1]: `mean` and `std` say how the inputs were normalised
    (0 and 1: not at all). Unless they are given, R is the mean square distance to the input as it is. With
    `positions`, T reads some of them and R all. Wang et al., "Revisiting locally supervised learning" (ICLR
    2021), and its released code.
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "Wang et al. 2021, Revisiting locally supervised learning"
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("sgd", 0.1, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
        source="Wang et al. 2021, released code for STL-10: batches of 128, 160 epochs, cosine",
        network="BatchNorm in every module",
    )

    task: str = option(
        "softmax", "softmax: the user's loss of a head; contrast: of its features", choices=TASKS
    )
    reconstruction: tuple[float, float] = option(
        (1.0, 0.0),
        "lambda1 of the first module, and of the last with a local loss; published with mean and "
        "std: 5 for two modules, 5 and 0 for eight",
    )
    weight: tuple[float, float] = option(
        (0.5, 1.0), "lambda2 of the first module, and of the last with a local loss"
    )
    mean: tuple[float, ...] | float | None = option(
        None, "what was subtracted from images in [0, 1], for each channel or all"
    )
    std: tuple[float, ...] | float | None = option(None, "by what they were divided then")
    temperature: float = option(0.07, "of task='contrast'", range=(0.01, 1.0), scale="log")
    width: int = option(12, "hidden channels of image decoders", range=(4, 64), scale="log")
    positions: float | None = option(None, **POSITIONS)
    rank: int | None = option(None, **RANK)
    local_loss: LossLike | None = option(None, **LOCAL_LOSS)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise MethodError(f"task={self.task!r}; {nearest(self.task, TASKS)}")
        if (self.mean is None) != (self.std is None):
            raise MethodError("give both mean and std, or neither")
        for name in ("reconstruction", "weight"):
            ends = getattr(self, name)
            if len(ends) != 2 or min(ends) < 0:
                raise MethodError(
                    f"{name}={ends!r}: give two weights of 0 or more, of the first and the last"
                )
        if not self.temperature > 0:
            raise MethodError(f"temperature={self.temperature}: give a number above 0")
        if any(r + w == 0 for r, w in zip(self.reconstruction, self.weight, strict=True)):
            raise MethodError("reconstruction and weight are both 0 for a module, which nothing would train")
        if self.task == "contrast":
            if self.positions is not None or self.rank is not None:
                raise MethodError(
                    "positions= and rank= are of task='softmax', whose heads predict; leave them out"
                )
            object.__setattr__(self, "target", (CLASS_IDS,))

    def passes(self) -> Sequence[Pass]:
        """Return the two terms, and the loss at the output."""
        heads = AttachHeads("infopro", positions=self.positions, rank=self.rank)
        term: LocalTerm = HeadTerm("head", self.weight, heads, self.local_loss)
        if self.task == "contrast":
            term = Contrast("contrast", self.weight, temperature=self.temperature)
        loss = ImageLoss(self.mean, self.std)
        return (Reconstruction("reconstruction", self.reconstruction, loss, self.width), term, OutputLoss())
