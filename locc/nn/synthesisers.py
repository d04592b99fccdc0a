"""Synthesisers of gradients: from a boundary (and the labels) to a value of the boundary's own shape.

Jaderberg et al., "Decoupled neural interfaces using synthetic gradients" (2017); Czarnecki et al. (2017).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locc.errors import MethodError
from locc.ir.spec import TensorSpec
from locc.nn.building import BATCH_NORM, CONV, check_shapes, placement, zero_
from locc.nn.labels import IGNORE_INDEX
from locc.nn.layout import Layout, guess_layout, resize


class Synthesiser(nn.Module):
    """Three layers, shape preserving; the last one starts at zero, weight and bias.

    Flat values: 2 x (linear of `width`, BN, ReLU), linear. Images: 2 x (conv 5 of `width`, BN, ReLU), conv 5.
    Sequences: the flat one at every position with LayerNorm for BN, as batch statistics over positions would
    let a token see those after it. The label context is a linear map added after the first layer (cDNI).
    """

    def __init__(
        self,
        spec: TensorSpec,
        num_classes: int | None = None,
        *,
        width: int | None = None,
        layout: Layout | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = guess_layout(spec, layout)
        self.image = self.layout.kind == "image"
        channels = self.layout.channels(spec)
        at: Any = placement(spec, device, dtype)
        layer, norm, hidden = self._kinds(128 if self.image else 1024, width)
        self.first = layer(channels, hidden, **at)
        self.context = None if num_classes is None else nn.Linear(num_classes, hidden, bias=False, **at)
        self.hidden = nn.Sequential(
            norm(hidden, **at), nn.ReLU(), layer(hidden, hidden, **at), norm(hidden, **at), nn.ReLU()
        )
        self.last = layer(hidden, channels, **at)
        zero_(self.last)

    def _kinds(self, default: int, width: int | None) -> tuple[Any, Any, int]:
        hidden = default if width is None else width
        if self.image:
            rank = len(self.layout.position_dims)
            conv: Any = CONV[rank]
            return lambda n, m, **at: conv(n, m, 5, padding=2, **at), BATCH_NORM[rank], hidden
        return nn.Linear, nn.LayerNorm if self.layout.kind == "sequence" else nn.BatchNorm1d, hidden

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the gradient at `h`.

        Args:
            h: the boundary.
            y: the labels if built with a context: class ids [B] or vectors [B,C] for the whole sample; ids
                [B,T] or [B,*space], or vectors with C last, per position (time first where `h` is); -100
                is no label.
        """
        if (y is None) != (self.context is None):
            asked = "without a label context" if self.context is None else "with a label context"
            raise MethodError(f"this synthesiser was built {asked}; call it so, or build it with num_classes")
        x = self.layout.first(h) if self.image else self.layout.last(h)
        a: Tensor = self.first(x)
        if y is not None:
            a = a + self._labels(y, a)
        out: Tensor = self.last(self.hidden(a))
        return self.layout.from_first(out) if self.image else self.layout.from_last(out)

    def _labels(self, y: Tensor, a: Tensor) -> Tensor:
        """The context in the form of `a`: [B,W], [B,1|T,W] or [B,W,1|*space]."""
        assert self.context is not None
        if y.is_floating_point():
            c: Tensor = self.context(y.to(self.context.weight.dtype))
        else:  # ids: the rows of the map, without a [..,C] vector of a large vocabulary
            known = (y != IGNORE_INDEX).unsqueeze(-1)
            c = F.embedding(y.clamp_min(0), self.context.weight.t()) * known
        if c.dim() == 2:
            c = c.view(c.shape[0], *[1] * (a.dim() - 2), c.shape[1])
        elif self.layout.batch_dim:
            c = c.transpose(0, 1)
        if not self.image:
            return c
        c = c.movedim(-1, 1)
        return c if all(n == 1 for n in c.shape[2:]) else resize(c, tuple(a.shape[2:]))


def build_synthesiser(
    spec: TensorSpec,
    num_classes: int | TensorSpec | None = None,
    *,
    width: int | None = None,
    layout: Layout | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the synthesiser of a boundary: `forward(h)`, or `forward(h, y)` with a label context.

    Args:
        spec: the boundary; the result has its shape.
        num_classes: None for DNI; for cDNI the number of classes, or the model's output, whose last dimension
            (dimension 1 of a dense output with channels first) holds them.
        width: of the hidden layers; 1024, or 128 for images, unless given.
        layout: of the boundary, where `guess_layout` guesses wrong.
        device: of the parameters.
        dtype: of the parameters; the boundary's unless given.

    Raises:
        MethodError: `spec` has no known layout.
    """
    if isinstance(num_classes, TensorSpec):
        num_classes = guess_layout(num_classes).channels(num_classes)
    network = Synthesiser(spec, num_classes, width=width, layout=layout, device=device, dtype=dtype)
    inputs = [spec]
    if num_classes is not None:
        batch = spec.shape[network.layout.batch_dim]
        inputs.append(TensorSpec((batch, num_classes), spec.dtype))
    check_shapes(network, tuple(inputs), spec, "the synthesiser")
    return network
