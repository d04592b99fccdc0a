"""Affine maps from a value of any layout to one of any other, dense only where a vector is involved.

A dense map between two feature maps has as many weights as the product of their sizes: 335 million between
two of a ResNet. Between maps a convolution does, and between token sequences one matrix over tokens and one
over channels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from locc.ir.spec import FreeDim, TensorSpec
from locc.nn.building import CONV, CONV_TRANSPOSE, MAX_WEIGHTS, guard_weights, numel, orthogonal_
from locc.nn.layout import Layout, coarse, in_proportion, regrid, split_dim


class DenseMap(nn.Module):
    """Flatten, linear, unflatten: any layout to any layout. A `grid` is what positions are averaged to."""

    def __init__(
        self,
        from_spec: TensorSpec,
        to_spec: TensorSpec,
        source: Layout,
        target: Layout,
        grid: tuple[int, ...] = (),
        **at: Any,
    ) -> None:
        super().__init__()
        self.source, self.target, self.grid = source, target, grid
        self.shape = (*target.sizes(to_spec), target.channels(to_spec))
        columns = source.channels(from_spec) * math.prod(grid) if grid else numel(from_spec)
        self.linear = nn.Linear(columns, numel(to_spec), **at)

    def forward(self, h: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`."""
        x = regrid(self.source.first(h), self.grid).movedim(1, -1) if self.grid else self.source.last(h)
        y: Tensor = self.linear(x.flatten(1))
        return self.target.from_last(split_dim(y, 1, self.shape))


class PositionMap(nn.Module):
    """Linear at every position of sequences of equal length, or of a vector: [B,T,D] -> [B,T,D']."""

    def __init__(
        self, from_spec: TensorSpec, to_spec: TensorSpec, source: Layout, target: Layout, **at: Any
    ) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.linear = nn.Linear(source.channels(from_spec), target.channels(to_spec), **at)

    def forward(self, h: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`."""
        return self.target.from_last(self.linear(self.source.last(h)))


class TokenMap(nn.Module):
    """One matrix over the positions, in row order, then one over the channels: [B,T,D] -> [B,T',D'].

    Where lengths vary, or the matrix over them would be too large, positions are resampled instead.
    """

    def __init__(
        self,
        from_spec: TensorSpec,
        to_spec: TensorSpec,
        source: Layout,
        target: Layout,
        limit: int,
        **at: Any,
    ) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.example, self.sizes = source.sizes(from_spec), target.sizes(to_spec)
        before, after = math.prod(self.example), math.prod(self.sizes)
        free = bool(from_spec.free or to_spec.free)
        self.mix = None if free or before * after > limit else nn.Linear(before, after, **at)
        self.linear = nn.Linear(source.channels(from_spec), target.channels(to_spec), **at)

    def forward(self, h: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`."""
        x = self.source.first(h)
        if self.mix is None:
            x = regrid(x, in_proportion(x, self.example, self.sizes))
        else:
            x = split_dim(self.mix(x.flatten(2)), 2, self.sizes)
        return self.target.from_last(self.linear(x.movedim(1, -1)))


class ConvMap(nn.Module):
    """A convolution between maps, or from patch tokens to a map: [B,C,*space] -> [B,C',*space'].

    Growth by whole factors: a transposed convolution with kernel = stride = factor. Otherwise: resize, then a
    convolution of width 3, or of width 1 with `pointwise`. A class token is left out.
    """

    def __init__(
        self,
        from_spec: TensorSpec,
        to_spec: TensorSpec,
        source: Layout,
        target: Layout,
        *,
        pointwise: bool = False,
        **at: Any,
    ) -> None:
        super().__init__()
        self.source, self.target = source, target
        grid, self.sizes = grid_of(source, from_spec, target, to_spec), target.sizes(to_spec)
        channels, out, rank = source.channels(from_spec), target.channels(to_spec), len(self.sizes)
        factors = tuple(new // old for new, old in zip(self.sizes, grid, strict=True))
        whole = all(new == old * f for new, old, f in zip(self.sizes, grid, factors, strict=True))
        self.example = tuple(n - source.class_token for n in source.sizes(from_spec))
        self.grid = grid if whole else self.sizes
        build: Any
        if whole and math.prod(factors) > 1:
            build = CONV_TRANSPOSE[rank]
            self.conv: nn.modules.conv._ConvNd = build(channels, out, factors, stride=factors, **at)
        else:
            build, width = CONV[rank], 1 if pointwise else 3
            self.conv = build(channels, out, width, padding=width // 2, **at)

    def forward(self, h: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`."""
        x = self.source.first(h)
        if self.source.class_token:
            x = x[:, :, 1:]
        x = regrid(x, in_proportion(x, self.example, self.grid))
        return self.target.from_first(self.conv(x))


def affine_map(
    what: str,
    from_spec: TensorSpec,
    to_spec: TensorSpec,
    source: Layout,
    target: Layout,
    *,
    limit: int = MAX_WEIGHTS,
    pointwise: bool = False,
    **at: Any,
) -> nn.Module:
    """Return the affine map from one value to another, by their layouts.

      * Vectors, and sequences of equal length: linear per position.
      * Maps to maps, and tokens that form one: convolution with resizing.
      * Other tokens and maps: a matrix over positions, then one over channels.
      * A vector on either side: dense. Where that has more than `limit` weights, by way of a coarse map of
        at most `layout.COARSE` features: averaged before the dense layer, or resized and convolved after it.

    Args:
        what: what the map is, for the message.
        from_spec: what it reads.
        to_spec: what it gives.
        source: layout of the one.
        target: layout of the other.
        limit: largest dense weight to make.
        pointwise: a convolution that need not grow or shrink has width 1 instead of 3.
        **at: device and dtype of the parameters.

    Raises:
        MethodError: a dense weight over the limit all the same, or a vector to a map whose size varies.
    """
    if (
        source.kind == target.kind
        and source.kind in ("sequence", "flat")
        and _dims(source, from_spec) == _dims(target, to_spec)
    ):
        if target.kind == "flat":
            guard_weights(numel(to_spec), numel(from_spec), limit, f"{what} from {from_spec} to {to_spec}")
        return PositionMap(from_spec, to_spec, source, target, **at)
    if "flat" not in (source.kind, target.kind):
        if target.kind == "image" and grid_of(source, from_spec, target, to_spec):
            return ConvMap(from_spec, to_spec, source, target, pointwise=pointwise, **at)
        return TokenMap(from_spec, to_spec, source, target, limit, **at)
    name = f"{what} from {from_spec} to {to_spec}"
    if target.kind == "flat":
        grid = coarse_grid(from_spec, source, numel(to_spec), limit)
        columns = source.channels(from_spec) * math.prod(grid) if grid else numel(from_spec)
        guard_weights(numel(to_spec), columns, limit, name)
        return DenseMap(from_spec, to_spec, source, target, grid, **at)
    numel(to_spec)  # raises where it varies: a vector does not say of what size the map shall be
    grid = coarse_grid(to_spec, target, numel(from_spec), limit)
    plain = replace(target, class_token=False)  # no position of a coarse sequence is one
    small = _resized(to_spec, target, grid) if grid else to_spec
    guard_weights(numel(small), numel(from_spec), limit, name)
    dense = DenseMap(from_spec, small, source, plain, **at)
    if not grid:
        return dense
    return nn.Sequential(dense, affine_map(what, small, to_spec, plain, plain, limit=limit, **at))


def coarse_grid(spec: TensorSpec, layout: Layout, units: int, limit: int) -> tuple[int, ...]:
    """Return to which positions a map shrinks that meets a vector of `units`; () if a dense weight serves."""
    if layout.kind == "flat" or not (spec.free or numel(spec) * units > limit):
        return ()
    return coarse(layout.channels(spec), layout.sizes(spec))


def unit_(network: nn.Module) -> None:
    """Start each layer of maps with unit singular values and no bias, convolutions at their centre tap."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            orthogonal_(layer.weight)
        elif isinstance(layer, nn.modules.conv._ConvTransposeNd):
            orthogonal_(layer.weight.detach().flatten(1))
        elif isinstance(layer, nn.modules.conv._ConvNd):
            nn.init.zeros_(layer.weight)
            centre: tuple[slice | int, ...] = (slice(None), slice(None), *(k // 2 for k in layer.kernel_size))
            orthogonal_(layer.weight.detach()[centre])
        else:
            continue
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def he_normal_(network: nn.Module) -> None:
    """Start each layer of maps with weights N(0, 2 / inputs of a unit) and without a bias."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # kernel = stride: each output has one tap
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_channels))
        elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            continue
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def grid_of(source: Layout, from_spec: TensorSpec, target: Layout, to_spec: TensorSpec) -> tuple[int, ...]:
    """Return the map that the positions of `source` form in the rank of `target`; () if they form none."""
    sizes, rank = source.sizes(from_spec), len(target.position_dims)
    if source.class_token:
        sizes = (sizes[0] - 1,)
    if len(sizes) == rank:
        return sizes
    if len(sizes) == 1 and sizes[0] == math.prod(target.sizes(to_spec)):
        return target.sizes(to_spec)
    side = math.isqrt(sizes[0])
    return (side, side) if len(sizes) == 1 and rank == 2 and side * side == sizes[0] else ()


def with_channels(spec: TensorSpec, layout: Layout, channels: int) -> TensorSpec:
    """Return `spec` with another number of channels."""
    shape = list(spec.shape)
    shape[layout.channel_dim] = channels
    return TensorSpec(tuple(shape), spec.dtype)


def _resized(spec: TensorSpec, layout: Layout, sizes: tuple[int, ...]) -> TensorSpec:
    shape = list(spec.shape)
    for dim, size in zip(layout.position_dims, sizes, strict=True):
        shape[dim] = size
    return TensorSpec(tuple(shape), spec.dtype)


def _dims(layout: Layout, spec: TensorSpec) -> list[int | FreeDim]:
    return [d for d in (spec.shape[i] for i in layout.position_dims) if isinstance(d, (int, FreeDim))]
