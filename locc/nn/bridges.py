"""Associated learning's label encoder g, label decoder h and bridge b.

Kao & Chen, "Associated learning: decomposing end-to-end backpropagation based on autoencoders and target
propagation" (2021). Dense layers with sigmoids, He-normal weights, zero biases.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from locc.ir.spec import TensorSpec
from locc.nn.building import MAX_WEIGHTS, agree_on_rows, check_shapes, guard_weights, numel, placement
from locc.nn.layout import Layout, guess_layout


class DenseSigmoid(nn.Module):
    """Flatten, then one (linear, sigmoid) per width, then the shape of `to_spec`.

    Two sequences of equal length are mapped position by position instead, also in the label stream of a
    token-level model.
    """

    def __init__(
        self,
        from_spec: TensorSpec,
        to_spec: TensorSpec,
        hidden: float | None = None,
        *,
        from_layout: Layout | str | None = None,
        to_layout: Layout | str | None = None,
        max_weights: int = MAX_WEIGHTS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.source, self.target = guess_layout(from_spec, from_layout), guess_layout(to_spec, to_layout)
        agree_on_rows(from_spec, to_spec)
        self.per_position = self.source.kind == self.target.kind == "sequence" and self.source.sizes(
            from_spec
        ) == self.target.sizes(to_spec)
        self.shape = (*self.target.sizes(to_spec), self.target.channels(to_spec))
        at: Any = placement(from_spec, device, dtype)
        if self.per_position:
            start, end = self.source.channels(from_spec), self.target.channels(to_spec)
        else:
            start, end = numel(from_spec), numel(to_spec)
        widths = [start, end] if hidden is None else [start, max(1, round(hidden * end)), end]
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise(widths):
            guard_weights(m, n, max_weights, f"the dense map from {from_spec} to {to_spec}")
            layers += [nn.Linear(n, m, **at), nn.Sigmoid()]
        self.net = nn.Sequential(*layers)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, s: Tensor) -> Tensor:
        """Map a value of `from_spec` to one of `to_spec`, in (0, 1)."""
        x = self.source.last(s)
        if self.per_position:
            return self.target.from_last(self.net(x))
        y: Tensor = self.net(x.flatten(1))
        return self.target.from_last(y.unflatten(1, self.shape))


def build_label_encoder(from_spec: TensorSpec, to_spec: TensorSpec, **options: Any) -> nn.Module:
    """Build g_i: t_{i-1} -> t_i, one dense layer and a sigmoid; `options` as in `build_bridge`."""
    return _checked(DenseSigmoid(from_spec, to_spec, **options), from_spec, to_spec, "the label encoder")


def build_label_decoder(from_spec: TensorSpec, to_spec: TensorSpec, **options: Any) -> nn.Module:
    """Build h_i: t_i -> t_{i-1}, one dense layer and a sigmoid; `options` as in `build_bridge`."""
    return _checked(DenseSigmoid(from_spec, to_spec, **options), from_spec, to_spec, "the label decoder")


def build_bridge(
    from_spec: TensorSpec, to_spec: TensorSpec, *, expansion: float = 5, **options: Any
) -> nn.Module:
    """Build b_i: s_i -> t_i: flatten, dense of `expansion` x d, sigmoid, dense of d, sigmoid.

    Args:
        from_spec: s_i, the boundary.
        to_spec: t_i, with d features.
        expansion: width of the hidden layer in units of d.
        **options: from_layout, to_layout, max_weights (largest dense weight to make), device, dtype.

    Raises:
        MethodError: a value without a known layout, or too large a dense weight.
    """
    return _checked(DenseSigmoid(from_spec, to_spec, expansion, **options), from_spec, to_spec, "the bridge")


def _checked(network: nn.Module, from_spec: TensorSpec, to_spec: TensorSpec, what: str) -> nn.Module:
    check_shapes(network, (from_spec,), to_spec, what)
    return network
