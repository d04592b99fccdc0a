"""Associated learning's label encoder g, label decoder h and bridge b.

Kao & Chen, "Associated learning: decomposing end-to-end backpropagation based on autoencoders and target
propagation" (2021). Layers with sigmoids, He-normal weights, zero biases; dense as theirs wherever a vector
is involved. Between maps, where theirs never are, they are what `locc.nn.maps` says.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from locc.ir.spec import TensorSpec
from locc.nn.building import MAX_WEIGHTS, agree_on_rows, check_shapes, numel, placement
from locc.nn.layout import Layout, guess_layout, pool
from locc.nn.maps import affine_map, coarse_grid, he_normal_, with_channels

CODE_VARIANCE = 0.0684
"""Of the entries of a code over classes, about 1/2: that of a sigmoid of N(0, 2)."""
TO_A_MAP = 2**22
"""Most entries of a bridge's dense weight where the code is a map: in the authors' networks it never is."""


class SigmoidMap(nn.Module):
    """One or two (affine map, sigmoid), see `locc.nn.maps`.

    The hidden layer of two is a vector, as the authors': each unit of a label's code is about the whole
    sample, and no local map can tell it. It has `hidden` times as many units as the result, fewer where that
    is a map and a dense weight would be large. With `per_position`, for labels that are one a position, it
    has `hidden` times the channels at each position of the result.

    A vector is told by the class token alone of a sequence that has one, as a head tells its class: what
    other tokens know is of use to later modules only where that token has learned it.
    """

    def __init__(
        self,
        from_spec: TensorSpec,
        to_spec: TensorSpec,
        hidden: float | None = None,
        *,
        per_position: bool = False,
        from_layout: Layout | str | None = None,
        to_layout: Layout | str | None = None,
        max_weights: int = MAX_WEIGHTS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        source, target = guess_layout(from_spec, from_layout), guess_layout(to_spec, to_layout)
        agree_on_rows(from_spec, to_spec)
        at: Any = placement(from_spec, device, dtype)
        way = [(from_spec, source), (to_spec, target)]
        if hidden is not None and not (per_position and target.kind != "flat"):
            if target.kind != "flat":
                max_weights = min(max_weights, TO_A_MAP)
            units = _units(from_spec, to_spec, source, target, hidden, max_weights)
            flat = TensorSpec((to_spec.shape[target.batch_dim], units), to_spec.dtype)
            way.insert(1, (flat, Layout.flat()))
        elif hidden is not None:
            channels = max(1, round(hidden * target.channels(to_spec)))
            way.insert(1, (with_channels(to_spec, target, channels), target))
        layers: list[nn.Module] = []
        if source.class_token and way[1][1].kind == "flat":
            layers.append(_Pooled(source))
            flat = TensorSpec(
                (from_spec.shape[source.batch_dim], source.channels(from_spec)), from_spec.dtype
            )
            way[0] = (flat, Layout.flat())
        for i, ((a, above), (b, below)) in enumerate(itertools.pairwise(way)):
            made = affine_map("the map", a, b, above, below, limit=max_weights, pointwise=i > 0, **at)
            layers += [made, nn.Sigmoid()]
        self.net = nn.Sequential(*layers)
        he_normal_(self)

    def forward(self, s: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`, in (0, 1)."""
        y: Tensor = self.net(s)
        return y


class _Centred(nn.Module):
    def forward(self, code: Tensor) -> Tensor:
        return code - 0.5


class _Pooled(nn.Module):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return pool(x, self.layout)


def _units(
    from_spec: TensorSpec, to_spec: TensorSpec, source: Layout, target: Layout, factor: float, limit: int
) -> int:
    """Return the number of units of a hidden vector."""
    units = max(1, round(factor * numel(to_spec)))
    if target.kind == "flat":
        return units
    widths = []
    for spec, layout in ((from_spec, source), (to_spec, target)):
        grid = coarse_grid(spec, layout, units, limit)
        widths.append(layout.channels(spec) * math.prod(grid) if grid else numel(spec))
    return max(1, min(units, limit // max(widths)))


def build_label_encoder(
    from_spec: TensorSpec, to_spec: TensorSpec, *, one_hot: bool = False, **options: Any
) -> nn.Module:
    """Build g_i: t_{i-1} -> t_i, one affine map and a sigmoid; `options` as in `build_bridge`.

    He's rule counts on inputs of mean 0 and variance 1. A label has a single 1 among its C classes, and
    codes differ by `CODE_VARIANCE` around 1/2, so that by this rule the codes of two classes are the closer
    to each other the more classes there are and the deeper the code, until bridges find no difference to
    learn. Here each sigmoid reads values of mean 0 and variance 2 over classes, at each depth and for any C.

    Args:
        from_spec: t_{i-1}.
        to_spec: t_i.
        one_hot: whether t_{i-1} is the label itself.
        **options: as in `build_bridge`.
    """
    network = SigmoidMap(from_spec, to_spec, **options)
    classes = guess_layout(from_spec, options.get("from_layout")).channels(from_spec)
    first = next(
        layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    )
    with torch.no_grad():
        first.weight.mul_(math.sqrt(classes if one_hot else 1 / CODE_VARIANCE))
    if not one_hot:
        network.net.insert(0, _Centred())
    return _checked(network, from_spec, to_spec, "the label encoder")


def build_label_decoder(
    from_spec: TensorSpec, to_spec: TensorSpec, *, scores: bool = False, **options: Any
) -> nn.Module:
    """Build h_i: t_i -> t_{i-1}, one affine map and a sigmoid; `options` as in `build_bridge`.

    With `scores` it leaves out the sigmoid.
    """
    network = SigmoidMap(from_spec, to_spec, **options)
    if scores:
        del network.net[-1]
    return _checked(network, from_spec, to_spec, "the label decoder")


def build_bridge(
    from_spec: TensorSpec, to_spec: TensorSpec, *, expansion: float = 5, **options: Any
) -> nn.Module:
    """Build b_i: s_i -> t_i: a map to `expansion` x d units, sigmoid, a map to d, sigmoid.

    Args:
        from_spec: s_i, the boundary.
        to_spec: t_i, with d features.
        expansion: width of the hidden layer in units of d (of its channels, between maps).
        **options: per_position (the labels are one a position, not one a sample), from_layout, to_layout,
            max_weights (largest dense weight to make), device, dtype.

    Raises:
        MethodError: a value without a known layout, or too large a dense weight.
    """
    return _checked(SigmoidMap(from_spec, to_spec, expansion, **options), from_spec, to_spec, "the bridge")


def _checked(network: nn.Module, from_spec: TensorSpec, to_spec: TensorSpec, what: str) -> nn.Module:
    check_shapes(network, (from_spec,), to_spec, what)
    return network
