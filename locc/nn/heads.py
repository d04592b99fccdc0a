"""Classifier heads: from a boundary to a value of the shape of the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locc.errors import MethodError, nearest
from locc.ir.spec import TensorSpec
from locc.nn.building import ADAPTIVE_POOL, BATCH_NORM, CONV, check_shapes, placement
from locc.nn.conv_heads import CascadeHead, GreedyHead, InfoProHead
from locc.nn.layout import Layout, regrid, resize
from locc.nn.readout import Head, HeadOptions, classifier

HIDDEN = 2048
"""Most units of a hidden linear layer of MLP-SR, unless told otherwise: 4C of 512 channels."""


class LinearHead(Head):
    """Pool and linear, or linear at every position: any boundary to the output's shape."""

    def __init__(
        self,
        spec: TensorSpec,
        output: TensorSpec,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(spec, output, **options)
        at = placement(spec, **options)
        width, classes = self.readout.in_features, self.readout.out_features
        self.linear = classifier(width, classes, options.get("rank"), **at)

    def rows(self, h: Tensor) -> Tensor:
        """Return the classifier's result."""
        y: Tensor = self.linear(self.readout.read(h))
        return y


class FixedHead(Head):
    """Random linear classifier that never trains: M ~ U(+-1/sqrt(d)), no bias, kept in a buffer.

    Mostafa, Ramesh & Cauwenberghs, "Deep supervised learning using local errors".
    """

    weight: Tensor

    def __init__(
        self,
        spec: TensorSpec,
        output: TensorSpec,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(spec, output, **options)
        width = self.readout.in_features
        weight = torch.empty(self.readout.out_features, width, **placement(spec, **options))
        # A buffer reaches neither the optimiser nor weight decay, and is saved with the rest.
        self.register_buffer("weight", weight.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width)))

    def rows(self, h: Tensor) -> Tensor:
        """Return the classifier's result."""
        return F.linear(self.readout.read(h), self.weight)


class DGLHead(Head):
    """DGL's spatially-reduced MLP ("MLP-SR") head; with `convs=0` its "MLP" head.

    Belilovsky, Eickenberg & Oyallon, "Decoupled greedy learning of CNNs". On images: adaptive pool to
    ceil(size/4), `convs` x (conv1x1 C->C, BN, ReLU), pool to 2x2, 3 x (linear 4C->4C, BN, ReLU), linear.
    As in the released code, the convolutions have no bias, the linear layers have one, and "MLP" is
    the same class without convolutions. Elsewhere:
      * sequences and 1-D images: the same in one dimension, pooled to 4 positions; 3-D: to 2x2x2;
      * flat values and class tokens: 3 x (linear, BN, ReLU), linear, as there is no space to reduce;
      * a linear layer per token: 3 x (linear, LayerNorm, ReLU), linear, unpooled: batch statistics over
        positions would let a token see those after it;
      * dense outputs of images: 3 x conv1x1 at ceil(size/4), conv1x1, resized to the output.
    A hidden linear layer has at most `hidden` units, by default as many as the widest of the paper's: at 4C
    the heads of a ResNet-50 would have most of a billion parameters.
    Initial values of the ImageNet code: convolutions Kaiming normal (fan-out), linear layers N(0, 0.01^2).
    """

    def __init__(
        self,
        spec: TensorSpec,
        output: TensorSpec,
        *,
        convs: int = 3,
        hidden: int = HIDDEN,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(spec, output, **options)
        plan = self.readout
        found, width = plan.layout, plan.in_features
        at: Any = placement(spec, **options)
        tokens = plan.per_position and found.kind == "sequence"
        self.spatial: nn.Module | None = None
        if found.kind != "flat" and not found.class_token and not tokens:
            rank = len(found.position_dims) if plan.folded_in == 1 else 1
            layers: list[nn.Module] = [_Quarter(rank)]
            for _ in range(3 if plan.per_position else convs):
                conv = CONV[rank](width, width, 1, bias=False, **at)
                layers += [conv, BATCH_NORM[rank](width, **at), nn.ReLU()]
            if not plan.per_position:
                grid = {1: (4,), 2: (2, 2), 3: (2, 2, 2)}[rank]
                layers += [ADAPTIVE_POOL[rank](grid), nn.Flatten()]
                width *= math.prod(grid)
            self.spatial = nn.Sequential(*layers)
        norm = nn.LayerNorm if tokens else nn.BatchNorm1d
        dense: list[nn.Module] = []
        for _ in range(0 if self.spatial is not None and plan.per_position else 3):
            units = min(width, hidden)
            dense += [nn.Linear(width, units, **at), norm(units, **at), nn.ReLU()]
            width = units
        last = classifier(width, plan.out_features, options.get("rank"), **at)
        self.dense = nn.Sequential(*dense, last)
        first = last[0] if isinstance(last, nn.Sequential) else None
        for layer in self.modules():
            if layer is not first:  # two factors so small would have no gradient to speak of
                _dgl_init(layer)

    def rows(self, h: Tensor) -> Tensor:
        """Return the classifier's result."""
        plan = self.readout
        x: Tensor = plan.read(h) if self.spatial is None else self.spatial(plan.layout.first(plan.unfold(h)))
        reduced = self.spatial is not None and plan.per_position
        y: Tensor = self.dense(x.movedim(1, -1) if reduced else x)
        return regrid(y.movedim(-1, 1), plan.positions(h)).movedim(1, -1) if reduced else y


class _Quarter(nn.Module):
    """Adaptive mean over [B,D,*positions] to a quarter of the positions in each dimension, rounded up."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """Shrink `x`."""
        return resize(x, tuple(-(-n // 4) for n in x.shape[2:]))


def _dgl_init(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearHead,
    "mlp-sr": DGLHead,
    "mlp": partial(DGLHead, convs=0),
    "cnn": partial(GreedyHead, halve=False),
    "fixed": FixedHead,
    "greedy": GreedyHead,
    "cascade": CascadeHead,
    "infopro": InfoProHead,
}


def build_head(
    spec: TensorSpec,
    output: TensorSpec,
    kind: str = "linear",
    layout: Layout | str | None = None,
    **options: Any,
) -> nn.Module:
    """Build a head whose result has the shape of the model's output, so that the user's loss applies.

    Args:
        spec: the boundary.
        output: the model's output: [B,C] or [B] (per sample), [B,T,V], [B,V,T], [T,B,V] or [T*B,V] (per
            token), [B,C,*space] or [B,*space,C] (dense).
        kind: "linear", DGL's "mlp-sr" and "mlp" (option hidden) and "cnn" (depth, width), "fixed", "greedy"
            (depth, width), "cascade" (hidden, dropout, dim_in_decoder) or "infopro" (hidden, channels,
            stride).
        layout: of the boundary, where `guess_layout` guesses wrong.
        **options: `output_layout`, where it is guessed wrong; `device` and `dtype` of the parameters (the
            boundary's dtype unless given); `rank` of the last layer; and those of the kind.

    Raises:
        MethodError: an unknown kind, or no way from `spec` to `output`.
    """
    if kind not in HEADS:
        raise MethodError(f"head {kind!r} is unknown; {nearest(kind, HEADS)}")
    head = HEADS[kind](spec, output, layout=layout, **options)
    check_shapes(head, (spec,), output, f"the {kind} head")
    return head
