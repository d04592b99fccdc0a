"""Inverses g_k of target propagation: from a module's output space back to its input space.

Lee, Zhang, Fischer & Bengio, "Difference target propagation" (2015): one layer and an activation, with unit
singular values and zero biases at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locc.errors import MethodError, nearest
from locc.ir.spec import TensorSpec
from locc.nn.building import (
    CONV,
    CONV_TRANSPOSE,
    MAX_WEIGHTS,
    agree_on_rows,
    check_shapes,
    guard_weights,
    numel,
    orthogonal_,
    placement,
)
from locc.nn.layout import Layout, guess_layout, in_proportion, regrid

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "elu": F.elu,
    "linear": nn.Identity(),  # not a lambda: a program may be pickled to a worker
}


class DenseInverse(nn.Module):
    """activation(flatten -> linear -> unflatten): any layout to any layout."""

    def __init__(
        self,
        from_spec: TensorSpec,
        to_spec: TensorSpec,
        activation: Activation,
        source: Layout,
        target: Layout,
        max_weights: int,
        **at: Any,
    ) -> None:
        super().__init__()
        rows, columns = numel(to_spec), numel(from_spec)
        guard_weights(rows, columns, max_weights, f"the inverse from {from_spec} to {to_spec}")
        self.source, self.target, self.activation = source, target, activation
        self.shape = (*target.sizes(to_spec), target.channels(to_spec))
        self.linear = nn.Linear(columns, rows, **at)
        orthogonal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`."""
        y: Tensor = self.linear(self.source.last(h).flatten(1))
        return self.activation(self.target.from_last(y.unflatten(1, self.shape)))


class PositionInverse(nn.Module):
    """activation(linear) at every position of sequences of equal length: [B,T,D] -> [B,T,D']."""

    def __init__(
        self,
        from_spec: TensorSpec,
        to_spec: TensorSpec,
        activation: Activation,
        source: Layout,
        target: Layout,
        **at: Any,
    ) -> None:
        super().__init__()
        self.source, self.target, self.activation = source, target, activation
        self.linear = nn.Linear(source.channels(from_spec), target.channels(to_spec), **at)
        orthogonal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`."""
        return self.activation(self.target.from_last(self.linear(self.source.last(h))))


class ImageInverse(nn.Module):
    """activation(convolution) between maps: [B,C,*space] -> [B,C',*space'].

    Growth by whole factors: a transposed convolution with kernel = stride = factor. Otherwise: resize, then a
    convolution of width 3. Both start as semi-orthogonal maps, the latter at its centre tap alone, so they
    are the counterpart of a linear layer with unit singular values.
    """

    def __init__(
        self,
        from_spec: TensorSpec,
        to_spec: TensorSpec,
        activation: Activation,
        source: Layout,
        target: Layout,
        **at: Any,
    ) -> None:
        super().__init__()
        self.source, self.target, self.activation = source, target, activation
        grid, self.sizes = _grid(source, from_spec, target, to_spec), target.sizes(to_spec)
        channels, out, rank = source.channels(from_spec), target.channels(to_spec), len(self.sizes)
        factors = tuple(new // old for new, old in zip(self.sizes, grid, strict=True))
        whole = all(new == old * f for new, old, f in zip(self.sizes, grid, factors, strict=True))
        self.example = tuple(n - source.class_token for n in source.sizes(from_spec))
        self.grid = grid if whole else self.sizes
        self.conv: nn.ConvTranspose2d | nn.Conv2d  # or the 1-D and 3-D kinds
        build: Any
        if whole and math.prod(factors) > 1:
            build = CONV_TRANSPOSE[rank]
            self.conv = build(channels, out, factors, stride=factors, **at)
            orthogonal_(self.conv.weight.detach().flatten(1))
        else:
            build = CONV[rank]
            self.conv = build(channels, out, 3, padding=1, **at)
            nn.init.zeros_(self.conv.weight)
            centre: tuple[slice | int, ...] = (slice(None), slice(None), *[1] * rank)
            orthogonal_(self.conv.weight.detach()[centre])
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`."""
        x = self.source.first(h)
        if self.source.class_token:
            x = x[:, :, 1:]
        x = regrid(x, in_proportion(x, self.example, self.grid))
        return self.activation(self.target.from_first(self.conv(x)))


def build_inverse(
    from_spec: TensorSpec,
    to_spec: TensorSpec,
    activation: str | Activation = "tanh",
    *,
    from_layout: Layout | str | None = None,
    to_layout: Layout | str | None = None,
    max_weights: int = MAX_WEIGHTS,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the inverse g of a module: from its output space to its input space.

    Flat to flat: linear. Sequences of equal length: linear per position. Maps to maps, and tokens to maps
    (ViT's patch embedding): convolutions. Anything else: flatten, linear, unflatten.

    Args:
        from_spec: the module's output.
        to_spec: the module's input.
        activation: "tanh", "sigmoid", "relu", "elu", "linear" or a function; its range is that of `to_spec`.
        from_layout: of the output, where `guess_layout` guesses wrong.
        to_layout: of the input, likewise.
        max_weights: largest dense weight to make.
        device: of the parameters.
        dtype: of the parameters; that of `from_spec` unless given.

    Raises:
        MethodError: a value that has no inverse (integer, without a batch), or too large a dense weight.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise MethodError(f"activation {activation!r} is unknown; {nearest(activation, ACTIVATIONS)}")
        activation = ACTIVATIONS[activation]
    source, target = guess_layout(from_spec, from_layout), guess_layout(to_spec, to_layout)
    agree_on_rows(from_spec, to_spec)
    at = placement(from_spec, device, dtype)
    network: nn.Module
    if source.kind == target.kind == "sequence" and source.sizes(from_spec) == target.sizes(to_spec):
        network = PositionInverse(from_spec, to_spec, activation, source, target, **at)
    elif source.kind != "flat" and target.kind == "image" and _grid(source, from_spec, target, to_spec):
        network = ImageInverse(from_spec, to_spec, activation, source, target, **at)
    else:
        network = DenseInverse(from_spec, to_spec, activation, source, target, max_weights, **at)
    check_shapes(network, (from_spec,), to_spec, "the inverse")
    return network


def _grid(source: Layout, from_spec: TensorSpec, target: Layout, to_spec: TensorSpec) -> tuple[int, ...]:
    """The map that the positions of `source` form in the rank of `target`; () if they form none."""
    sizes, rank = source.sizes(from_spec), len(target.position_dims)
    if source.class_token:
        sizes = (sizes[0] - 1,)
    if len(sizes) == rank:
        return sizes
    if len(sizes) == 1 and sizes[0] == math.prod(target.sizes(to_spec)):
        return target.sizes(to_spec)
    side = math.isqrt(sizes[0])
    return (side, side) if len(sizes) == 1 and rank == 2 and side * side == sizes[0] else ()
