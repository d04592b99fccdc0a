"""Where the channels and the positions of a boundary value are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from locc.errors import MethodError, nearest
from locc.ir.spec import BatchDim, FreeDim, TensorSpec

Kind = Literal["flat", "sequence", "image"]

HINTS = ("flat", "sequence", "class_token", "channels_first", "channels_last")


@dataclass(frozen=True)
class Layout:
    """The meaning of each dimension of a boundary value.

    Attributes:
        kind: "flat" [B,D]; "sequence" [B,T,D] or [T,B,D]; "image" [B,C,*space] or [B,*space,C]
            with one to three spatial dimensions.
        channel_dim: index of the channels (features).
        position_dims: indices of time or space, in order; empty for "flat".
        class_token: position 0 of a sequence stands for the whole sample.
        batch_dim: index of the batch; 1 in a time-first sequence.
    """

    kind: Kind
    channel_dim: int
    position_dims: tuple[int, ...] = ()
    class_token: bool = False
    batch_dim: int = 0

    def __post_init__(self) -> None:
        dims = (self.batch_dim, *self.position_dims, self.channel_dim)
        counts = {"flat": (0,), "sequence": (1,), "image": (1, 2, 3)}
        if self.kind not in counts:
            raise MethodError(f"layout kind {self.kind!r} is unknown; {nearest(self.kind, counts)}")
        if sorted(dims) != list(range(len(dims))) or len(self.position_dims) not in counts[self.kind]:
            raise MethodError(
                f"{self} does not name each dimension once; a {self.kind} layout has "
                f"{' or '.join(map(str, counts[self.kind]))} position dimensions"
            )
        if self.class_token and self.kind != "sequence":
            raise MethodError(f"a {self.kind} layout has no class token; only a sequence can have one")

    @classmethod
    def flat(cls) -> Layout:
        """Return the layout of [B,D]."""
        return cls("flat", 1)

    @classmethod
    def sequence(cls, *, class_token: bool = False, time_first: bool = False) -> Layout:
        """Return the layout of [B,T,D], or of [T,B,D] if `time_first`."""
        batch = 1 if time_first else 0
        return cls("sequence", 2, (1 - batch,), class_token, batch)

    @classmethod
    def image(cls, rank: int = 2, *, channels_last: bool = False) -> Layout:
        """Return the layout of [B,C,*space], or of [B,*space,C], with `rank` spatial dimensions."""
        if channels_last:
            return cls("image", rank + 1, tuple(range(1, rank + 1)))
        return cls("image", 1, tuple(range(2, rank + 2)))

    @property
    def ndim(self) -> int:
        """Number of dimensions of a value of this layout."""
        return 2 + len(self.position_dims)

    def channels(self, spec: TensorSpec) -> int:
        """Return the number of channels of `spec`."""
        size = spec.shape[self.channel_dim]
        if isinstance(size, FreeDim):
            raise MethodError(
                f"the channels of {spec} may vary ('{size}'), and an auxiliary network needs a fixed "
                "number; leave them out of dynamic"
            )
        return _size(spec, self.channel_dim)

    def sizes(self, spec: TensorSpec) -> tuple[int, ...]:
        """Return the sizes of the positions of `spec`, the example's where they vary; () for a flat value."""
        return tuple(_size(spec, d) for d in self.position_dims)

    def last(self, x: Tensor) -> Tensor:
        """Bring `x` to [B,*positions,D]."""
        return _permute(x, (self.batch_dim, *self.position_dims, self.channel_dim))

    def first(self, x: Tensor) -> Tensor:
        """Bring `x` to [B,D,*positions]."""
        return _permute(x, (self.batch_dim, self.channel_dim, *self.position_dims))

    def from_last(self, x: Tensor) -> Tensor:
        """Bring [B,*positions,D] back to this layout."""
        return _permute(x, _inverse((self.batch_dim, *self.position_dims, self.channel_dim)))

    def from_first(self, x: Tensor) -> Tensor:
        """Bring [B,D,*positions] back to this layout."""
        return _permute(x, _inverse((self.batch_dim, self.channel_dim, *self.position_dims)))


def pool(x: Tensor, layout: Layout) -> Tensor:
    """Reduce `x` of any layout to [B,D]: its class token if it has one, else the mean over positions."""
    if layout.kind == "flat":
        return x
    if layout.class_token:
        return x.select(layout.position_dims[0], 0)
    return layout.last(x).mean(tuple(range(1, layout.ndim - 1)))


def positions(x: Tensor, layout: Layout) -> Tensor:
    """Keep the features of every position: `x` of any layout as [B,P,D], with P = 1 for a flat value."""
    return x.unsqueeze(1) if layout.kind == "flat" else layout.last(x).flatten(1, -2)


def check_boundary(spec: TensorSpec, what: str = "the boundary") -> None:
    """Raise unless `spec` is a value that an auxiliary network can read or imitate.

    Raises:
        MethodError: not real floating point, no single plain batch dimension, no features, too many
            dimensions.
    """
    if not spec.dtype.is_floating_point:
        raise MethodError(
            f"{what} {spec} has dtype {spec.dtype}, and an auxiliary network needs real floating-point "
            "features; cut after the layer that embeds it"
        )
    batch = [(i, d) for i, d in enumerate(spec.shape) if isinstance(d, BatchDim)]
    if len(batch) != 1 or batch[0][1].offset or batch[0][1].rows() < 1:
        raise MethodError(
            f"{what} {spec} needs exactly one dimension that is the batch, and has "
            f"{len(batch)} that grow with it; cut where every sample is a row of the value"
        )
    index = batch[0][0]
    if not 2 <= len(spec.shape) <= 5 or (index and (index, len(spec.shape)) != (1, 3)):
        raise MethodError(
            f"{what} {spec} has no known layout; known are [B,D], [B,T,D], [T,B,D], [B,C,L], [B,C,H,W], "
            "[B,H,W,C], [B,C,D,H,W] and [B,D,H,W,C]; cut elsewhere or pass your own factory"
        )
    if any(n < 1 for n in spec.concrete(1)):
        raise MethodError(f"{what} {spec} has an empty dimension; cut where the value has features")


def guess_layout(spec: TensorSpec, hint: Layout | str | None = None) -> Layout:
    """Guess the layout of a value from its shape.

    Rules, in order:
      * [B,D] is flat.
      * [T,B,D], the batch second, is a time-first sequence.
      * [B,T,D] is a sequence: shape alone does not tell it from [B,C,L] of a 1-D convolution. It has a class
        token if T - 1 is the square of an integer of at least 4 (17, 26, 37, 50, 65, 197, 257, ...).
        [B,C,1] with C > 1 is a pooled 1-D image.
      * four and five dimensions are an image. Of its last three dimensions: the last two equal, channels
        first ([B,64,8,8]); otherwise the first two equal, channels last ([B,7,7,768], [B,4,7,7,96]);
        otherwise channels first.

    Args:
        spec: the value.
        hint: a Layout, or one of `HINTS` where the rules guess wrong; `layout_of` finds one in a module.

    Raises:
        MethodError: `spec` has no known layout, or `hint` does not fit it.
    """
    check_boundary(spec)
    if isinstance(hint, Layout):
        return _fitting(hint, spec)
    if hint is not None and hint not in HINTS:
        raise MethodError(f"layout hint {hint!r} is unknown; {nearest(hint, HINTS)}")
    ndim, rank = len(spec.shape), len(spec.shape) - 2
    time_first = spec.batch_dim == 1
    if hint in ("sequence", "class_token") or time_first:
        return _fitting(Layout.sequence(class_token=hint == "class_token", time_first=time_first), spec)
    if hint == "flat" or ndim == 2:
        return _fitting(Layout.flat(), spec)
    if ndim == 3:
        steps, features = _size(spec, 1), _size(spec, 2)
        if hint == "channels_first" or (hint is None and features == 1 and steps > 1):
            return Layout.image(1)
        side = math.isqrt(steps - 1)
        fixed = not isinstance(spec.shape[1], FreeDim)
        return Layout.sequence(class_token=fixed and hint is None and side >= 4 and side * side == steps - 1)
    a, b, c = (_size(spec, i) for i in (-3, -2, -1))
    channels_last = hint == "channels_last" or (hint is None and b != c and a == b)
    return Layout.image(rank, channels_last=channels_last)


_CHANNELS_FIRST: dict[type[nn.Module], str] = {
    nn.modules.conv._ConvNd: "out_channels",
    nn.modules.batchnorm._NormBase: "num_features",
    nn.GroupNorm: "num_channels",
}
_CHANNELS_LAST: dict[type[nn.Module], str] = {
    nn.Linear: "out_features",
    nn.Embedding: "embedding_dim",
    nn.RNNBase: "hidden_size",
    nn.MultiheadAttention: "embed_dim",
}


def layout_of(module: nn.Module, spec: TensorSpec) -> Layout | None:
    """Infer the layout of the output `spec` of `module` from its last layer that tells, if any does.

    A convolution or batch norm whose channel count is dimension 1 means channels first; a linear layer,
    layer norm or recurrent layer whose width is the last dimension means channels last.
    """
    ndim = len(spec.shape)
    if ndim < 3 or spec.batch_dim != 0:
        return guess_layout(spec)
    for layer in reversed(list(module.modules())):
        rank = {"1d": 3, "2d": 4, "3d": 5}.get(type(layer).__name__[-2:].lower(), ndim)
        before = next((getattr(layer, a) for t, a in _CHANNELS_FIRST.items() if isinstance(layer, t)), None)
        after = next((getattr(layer, a) for t, a in _CHANNELS_LAST.items() if isinstance(layer, t)), None)
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and len(layer.normalized_shape) == 1:
            after = layer.normalized_shape[0]
        if before is not None and rank == ndim and before == spec.shape[1]:
            return guess_layout(spec, "channels_first")
        if after is not None and after == spec.shape[-1]:
            # A sequence keeps the guess about its class token.
            return guess_layout(spec, "channels_last") if ndim > 3 else _as_sequence(spec)
    return None


def resize(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Bring [B,D,*positions] to [B,D,*sizes]: adaptive mean where every size shrinks, else linear."""
    if tuple(x.shape[2:]) == sizes:
        return x
    if all(new <= old for new, old in zip(sizes, x.shape[2:], strict=True)):
        shrink: dict[int, Callable[..., Tensor]] = {
            1: F.adaptive_avg_pool1d,
            2: F.adaptive_avg_pool2d,
            3: F.adaptive_avg_pool3d,
        }
        return shrink[len(sizes)](x, list(sizes))
    return F.interpolate(x, size=sizes, mode=INTERPOLATION[len(sizes)], align_corners=False)


INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def split_dim(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """Unfold dimension `dim` of `x` into `sizes`, one of which may be -1."""
    out: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call, unused-ignore]
    return out


def regrid(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Bring [B,D,*positions] to [B,D,*sizes] also where the number of position dimensions changes.

    A square number of tokens unfolds into a square map in row order; else positions are resampled in row
    order.
    """
    rank, count = x.dim() - 2, math.prod(x.shape[2:])
    if rank == len(sizes):
        return resize(x, sizes)
    if count == math.prod(sizes):
        return split_dim(x.flatten(2), 2, sizes)
    side = math.isqrt(count)
    if rank == 1 and len(sizes) == 2 and side * side == count:
        return resize(split_dim(x, 2, (side, side)), sizes)
    return split_dim(resize(x.flatten(2), (math.prod(sizes),)), 2, sizes)


COARSE = 4096
"""Most features of a map that meets a vector where the whole is too large; `dim_in_decoder` of `predsim`."""


def pool_kernel(channels: int, sizes: tuple[int, ...], limit: float) -> tuple[int, ...]:
    """Double the kernel in each dimension in turn until channels * prod(ceil(size/kernel)) <= limit.

    A dimension that is pooled to one position is left alone.
    """
    kernel = [1] * len(sizes)
    turn = 0
    while channels * math.prod(map(ceil_div, sizes, kernel)) > limit:
        open_dims = [i for i in range(len(sizes)) if kernel[i] < sizes[i]]
        if not open_dims:
            break
        while turn not in open_dims:
            turn = (turn + 1) % len(sizes)
        kernel[turn] *= 2
        turn = (turn + 1) % len(sizes)
    return tuple(kernel)


def coarse(channels: int, sizes: tuple[int, ...], limit: int = COARSE) -> tuple[int, ...]:
    """Return sizes of positions, halved in turn, at which a map of so many channels has few features."""
    return tuple(map(ceil_div, sizes, pool_kernel(channels, sizes, limit)))


def ceil_div(n: int, k: int) -> int:
    """Return n / k, rounded up."""
    return -(-n // k)


def pooled(dim: int | FreeDim, k: int) -> int | FreeDim:
    """Return the size of a dimension that is pooled in windows of k, the last of which may be smaller."""
    if isinstance(dim, FreeDim):
        return FreeDim(f"{dim}/{k}", ceil_div(dim.size, k), ceil_div(dim.other, k))
    return ceil_div(dim, k)


def in_proportion(x: Tensor, example: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return what becomes of `sizes` where [B,D,*positions] has other positions than the example did."""
    if len(example) != x.dim() - 2 or len(sizes) != len(example):
        return sizes
    return tuple(n * wanted // old for n, wanted, old in zip(x.shape[2:], sizes, example, strict=True))


def _as_sequence(spec: TensorSpec) -> Layout:
    guess = guess_layout(spec)
    return guess if guess.kind == "sequence" else Layout.sequence()


def _fitting(layout: Layout, spec: TensorSpec) -> Layout:
    if layout.ndim != len(spec.shape) or layout.batch_dim != spec.batch_dim:
        raise MethodError(
            f"the layout {layout.kind!r} has {layout.ndim} dimensions with the batch at {layout.batch_dim}, "
            f"and the boundary is {spec}; pass a Layout that names its dimensions"
        )
    return layout


def _size(spec: TensorSpec, dim: int) -> int:
    if isinstance(spec.shape[dim], BatchDim):
        raise MethodError(f"dimension {dim} of {spec} is the batch, not channels or positions")
    return spec.concrete(1)[dim]


def _permute(x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x if order == tuple(range(len(order))) else x.permute(order)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))
