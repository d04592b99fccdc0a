"""Decoders: from a boundary back to the model's input, in [0, 1] or as it is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locc.ir.spec import TensorSpec
from locc.nn.building import (
    BATCH_NORM,
    CONV,
    MAX_WEIGHTS,
    agree_on_rows,
    check_shapes,
    guard_weights,
    numel,
    placement,
)
from locc.nn.layout import INTERPOLATION, Layout, guess_layout, regrid


def _squash(bounded: bool) -> nn.Module:
    return nn.Sigmoid() if bounded else nn.Identity()


class ImageDecoder(nn.Module):
    """InfoPro's decoder: upsample to the image size, conv3 -> 12, BN, ReLU, conv3 -> image channels, sigmoid.

    Wang et al., "Revisiting locally supervised learning" (ICLR 2021): bilinear with aligned corners,
    convolutions N(0, 2/(k^2 C_out)). Tokens of a sequence form a square map first.
    """

    def __init__(
        self,
        spec: TensorSpec,
        image: TensorSpec,
        *,
        width: int = 12,
        layout: Layout | str | None = None,
        image_layout: Layout | str | None = None,
        bounded: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.source, self.target = guess_layout(spec, layout), guess_layout(image, image_layout)
        self.sizes = self.target.sizes(image)
        rank = len(self.sizes)
        at: Any = placement(spec, device, dtype)
        conv: Any = CONV[rank]
        self.net = nn.Sequential(
            conv(self.source.channels(spec), width, 3, padding=1, **at),
            BATCH_NORM[rank](width, **at),
            nn.ReLU(),
            conv(width, self.target.channels(image), 3, padding=1, **at),
            _squash(bounded),
        )
        for layer in (self.net[0], self.net[3]):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        """Map the boundary `h` to the image's shape, in (0, 1)."""
        x = self.source.first(h)
        if self.source.class_token:
            x = x[:, :, 1:]
        if x.dim() - 2 == len(self.sizes):
            mode = INTERPOLATION[len(self.sizes)]
            x = F.interpolate(x, size=self.sizes, mode=mode, align_corners=True)
        else:
            x = regrid(x, self.sizes)
        return self.target.from_first(self.net(x))


class DenseDecoder(nn.Module):
    """The counterpart for flat values: linear D->D, BN, ReLU, linear to the input's size, sigmoid."""

    def __init__(
        self,
        spec: TensorSpec,
        image: TensorSpec,
        *,
        layout: Layout | str | None = None,
        image_layout: Layout | str | None = None,
        bounded: bool = True,
        max_weights: int = MAX_WEIGHTS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.source, self.target = guess_layout(spec, layout), guess_layout(image, image_layout)
        self.shape = (*self.target.sizes(image), self.target.channels(image))
        n, m = numel(spec), numel(image)
        guard_weights(max(n, m), n, max_weights, f"the decoder from {spec} to {image}")
        at = placement(spec, device, dtype)
        self.net = nn.Sequential(
            nn.Linear(n, n, bias=False, **at),
            nn.BatchNorm1d(n, **at),
            nn.ReLU(),
            nn.Linear(n, m, **at),
            _squash(bounded),
        )

    def forward(self, h: Tensor) -> Tensor:
        """Map the boundary `h` to the input's shape, in (0, 1)."""
        y: Tensor = self.net(self.source.last(h).flatten(1))
        return self.target.from_last(y.unflatten(1, self.shape))


class PositionDecoder(nn.Module):
    """The same per position, for sequences of equal length: linear, LayerNorm, ReLU, linear, sigmoid."""

    def __init__(
        self,
        spec: TensorSpec,
        image: TensorSpec,
        *,
        layout: Layout | str | None = None,
        image_layout: Layout | str | None = None,
        bounded: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.source, self.target = guess_layout(spec, layout), guess_layout(image, image_layout)
        n, m = self.source.channels(spec), self.target.channels(image)
        at = placement(spec, device, dtype)
        self.net = nn.Sequential(
            nn.Linear(n, n, **at), nn.LayerNorm(n, **at), nn.ReLU(), nn.Linear(n, m, **at), _squash(bounded)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Map the boundary `h` to the input's shape, in (0, 1)."""
        return self.target.from_last(self.net(self.source.last(h)))


def build_decoder(
    spec: TensorSpec,
    image: TensorSpec,
    *,
    layout: Layout | str | None = None,
    image_layout: Layout | str | None = None,
    bounded: bool = True,
    width: int = 12,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Build the decoder from a boundary to the model's input.

    Args:
        spec: the boundary.
        image: the model's input: an image of one to three dimensions, flat, or a sequence.
        layout: of the boundary, where `guess_layout` guesses wrong.
        image_layout: of the input, likewise.
        bounded: end in a sigmoid, for an input in [0, 1].
        width: hidden channels of an image decoder.
        device: of the parameters.
        dtype: of the parameters; the boundary's unless given.
        **options: max_weights of a dense decoder.

    Raises:
        MethodError: a value without a known layout (class ids, for one), or too large a dense weight.
    """
    source, target = guess_layout(spec, layout), guess_layout(image, image_layout)
    agree_on_rows(spec, image)
    kind: Any = DenseDecoder
    if source.kind == target.kind == "sequence" and source.sizes(spec) == target.sizes(image):
        kind = PositionDecoder
    elif target.kind == "image" and source.kind != "flat":
        kind, options = ImageDecoder, {"width": width}
    network: nn.Module = kind(
        spec,
        image,
        layout=layout,
        image_layout=image_layout,
        bounded=bounded,
        device=device,
        dtype=dtype,
        **options,
    )
    check_shapes(network, (spec,), image, "the decoder")
    return network
