"""Heads as three papers publish them for feature maps, with their counterparts for values without space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor, nn

from locc.ir.spec import TensorSpec
from locc.nn.building import BATCH_NORM, CONV, placement
from locc.nn.layout import resize
from locc.nn.predsim import Pooling
from locc.nn.readout import Head, HeadOptions, Readout, classifier


class GreedyHead(Head):
    """The auxiliary problem of greedy layerwise training: `depth` layers, then a linear classifier.

    Belilovsky, Eickenberg & Oyallon, "Greedy layerwise learning can scale to ImageNet" (2019), released code.
    On images: adaptive pool to ceil(size/2), depth x (conv3x3 to `width` channels, BN, ReLU), pool to 2x2,
    BN, linear. `width` is twice the boundary's channels unless given. Convolutions have no padding, as
    published, where the map has more than four positions a side. Elsewhere: depth x (linear, norm,
    ReLU), linear.

    With `halve=False` the map keeps its size, with padding, and its number of channels: DGL's "CNN" auxiliary
    (Belilovsky, Eickenberg & Oyallon 2020), as in its code; the 200 % of a layer's operations that
    the paper gives it are those of two such convolutions.
    """

    def __init__(
        self,
        spec: TensorSpec,
        output: TensorSpec,
        *,
        depth: int = 2,
        width: int | None = None,
        halve: bool = True,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(spec, output, **options)
        plan = self.readout
        at: Any = placement(spec, **options)
        self.shrink = 2 if halve else 1
        channels, wide = plan.in_features, width or self.shrink * plan.in_features
        self.spatial = _is_map(plan)
        layers: list[nn.Module] = []
        if self.spatial:
            sizes = plan.layout.sizes(spec)
            rank = len(sizes)
            padding = 0 if halve and min(_over(sizes, 2)) > 4 + 2 * depth - 2 else 1
            for _ in range(depth):
                layers += [
                    CONV[rank](channels, wide, 3, padding=padding, bias=False, **at),
                    BATCH_NORM[rank](wide, **at),
                ]
                layers.append(nn.ReLU())
                channels = wide
            layers += [_To(2, rank), BATCH_NORM[rank](channels, **at), nn.Flatten()]
            channels *= 2**rank
        else:
            for _ in range(depth):
                layers += [nn.Linear(channels, wide, bias=False, **at), _norm(plan)(wide, **at), nn.ReLU()]
                channels = wide
        self.net = nn.Sequential(*layers, classifier(channels, plan.out_features, options.get("rank"), **at))

    def rows(self, h: Tensor) -> Tensor:
        """Return the classifier's result."""
        plan = self.readout
        if not self.spatial:
            return self.net(plan.read(h))  # type: ignore[no-any-return]
        x = plan.layout.first(h)
        found: Tensor = self.net(resize(x, _over(x.shape[2:], self.shrink)))
        return found


class CascadeHead(Head):
    """The temporary head of deep cascade learning: flatten, 512, 256, classes, with ReLU and dropout of 0.5.

    Marquez, Hare & Niranjan, "Deep cascade learning" (2018), released code. A map is averaged until it has at
    most `dim_in_decoder` features, as the classifiers of `pred` do: flattened heads on early maps would take
    more memory than the network.
    """

    def __init__(
        self,
        spec: TensorSpec,
        output: TensorSpec,
        *,
        hidden: tuple[int, ...] = (512, 256),
        dropout: float = 0.5,
        dim_in_decoder: int = 4096,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(spec, output, **options)
        plan = self.readout
        at = placement(spec, **options)
        self.pool = Pooling(plan, spec, dim_in_decoder)
        width, layers = self.pool.features, []
        for units in hidden:
            layers += [nn.Linear(width, units, **at), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        self.net = nn.Sequential(*layers, classifier(width, plan.out_features, options.get("rank"), **at))

    def rows(self, h: Tensor) -> Tensor:
        """Return the classifier's result."""
        x: Tensor = self.net(self.pool(h))
        return x


class InfoProHead(Head):
    """InfoPro's head "1c2f": conv3x3, BN, ReLU, mean over the map, linear, ReLU, linear.

    Wang et al., "Revisiting locally supervised learning" (ICLR 2021), released code: the convolution has
    stride 2 and twice the channels, on maps of 8 x 8 and less stride 1 and the same; it has no bias, and is
    N(0, 2/(k^2 C_out)) at the start. Elsewhere a linear layer with a norm is in its place.
    """

    def __init__(
        self,
        spec: TensorSpec,
        output: TensorSpec,
        *,
        hidden: int = 128,
        channels: int | None = None,
        stride: int | None = None,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(spec, output, **options)
        plan = self.readout
        at: Any = placement(spec, **options)
        width = plan.in_features
        self.spatial = _is_map(plan)
        step = stride or (2 if self.spatial and min(plan.layout.sizes(spec)) > 8 else 1)
        wide = channels or width * step
        first: list[nn.Module]
        if self.spatial:
            rank = len(plan.layout.position_dims)
            conv = CONV[rank](width, wide, 3, stride=step, padding=1, bias=False, **at)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            first = [conv, BATCH_NORM[rank](wide, **at), nn.ReLU(), _To(1, rank), nn.Flatten()]
        else:
            first = [nn.Linear(width, wide, bias=False, **at), _norm(plan)(wide, **at), nn.ReLU()]
        last = classifier(hidden, plan.out_features, options.get("rank"), **at)
        rest = [nn.Linear(wide, hidden, **at), nn.ReLU(), last]
        self.net = nn.Sequential(*first, *rest)

    def rows(self, h: Tensor) -> Tensor:
        """Return the classifier's result."""
        plan = self.readout
        x: Tensor = self.net(plan.layout.first(h) if self.spatial else plan.read(h))
        return x


class _To(nn.Module):
    """Adaptive mean over [B,D,*positions] to `size` positions in each dimension."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.sizes = (size,) * rank

    def forward(self, x: Tensor) -> Tensor:
        """Pool `x`."""
        if math.prod(self.sizes) == 1:
            return x.mean(tuple(range(2, x.dim())), keepdim=True)
        return resize(x, self.sizes)


def _is_map(plan: Readout) -> bool:
    """Whether a head reads a map for each sample as a whole."""
    return plan.layout.kind == "image" and not plan.per_position and plan.folded_in == 1


def _norm(plan: Readout) -> type[nn.Module]:
    """Batch statistics over positions would let a token see those after it."""
    return nn.LayerNorm if plan.per_position else nn.BatchNorm1d


def _over(sizes: Sequence[int], shrink: int) -> tuple[int, ...]:
    return tuple(-(-n // shrink) for n in sizes)
