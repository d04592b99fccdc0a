"""Boundary values of every layout, as the tests of the auxiliary networks name them."""

from __future__ import annotations

import torch
from torch import Tensor

from locc.ir.spec import BatchDim, TensorSpec
from locc.nn import Layout

B = BatchDim()


def spec(*shape: int | BatchDim, dtype: torch.dtype = torch.float64) -> TensorSpec:
    return TensorSpec(shape, dtype)


def value(of: TensorSpec, batch: int = 3) -> Tensor:
    return torch.randn(of.concrete(batch), dtype=of.dtype)


BOUNDARIES: dict[str, tuple[TensorSpec, Layout | str | None]] = {
    "flat": (spec(B, 12), None),
    "sequence": (spec(B, 6, 8), None),
    "class token": (spec(B, 17, 8), None),
    "time first": (spec(6, B, 8), None),
    "image": (spec(B, 8, 6, 6), None),
    "odd image": (spec(B, 8, 5, 7), None),
    "channels last": (spec(B, 6, 6, 8), None),
    "1-D": (spec(B, 8, 10), "channels_first"),
    "3-D": (spec(B, 4, 4, 4, 4), None),
    "3-D channels last": (spec(B, 2, 4, 4, 8), None),
}

OUTPUTS: dict[str, TensorSpec] = {
    "class": spec(B, 5),
    "scalar": spec(B),
    "token": spec(B, 6, 11),
    "time first": spec(6, B, 11),
    "dense": spec(B, 3, 12, 12),
}
