"""Inverses g_k of target propagation: from a module's output space back to its input space.

Lee, Zhang, Fischer & Bengio, "Difference target propagation" (2015): one layer and an activation, with unit
singular values and zero biases at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locc.errors import MethodError, nearest
from locc.ir.spec import TensorSpec
from locc.nn.building import MAX_WEIGHTS, agree_on_rows, check_shapes, placement
from locc.nn.layout import Layout, guess_layout
from locc.nn.maps import affine_map, unit_

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "elu": F.elu,
    "linear": nn.Identity(),  # not a lambda: a program may be pickled to a worker
}


class Inverse(nn.Module):
    """activation(affine map), see `locc.nn.maps`; unit singular values and no bias at the start."""

    def __init__(self, map: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.map, self.activation = map, activation
        unit_(map)

    def forward(self, h: Tensor) -> Tensor:
        """Map a value of the module's output space to one of its input space."""
        return self.activation(self.map(h))


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

    An affine map by the layouts, as `locc.nn.maps.affine_map` says, and an activation.

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
    at: Any = placement(from_spec, device, dtype)
    maps = affine_map("the inverse", from_spec, to_spec, source, target, limit=max_weights, **at)
    network = Inverse(maps, activation)
    check_shapes(network, (from_spec,), to_spec, "the inverse")
    return network
