"""Shapes that know which of their dimensions is the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from locc.errors import LoccError


@dataclass(frozen=True)
class BatchDim:
    """A dimension of size `scale * B + offset`, where B is the batch size."""

    scale: int = 1
    offset: int = 0

    def at(self, batch: int) -> int:
        """Return the size of this dimension in a batch of `batch` samples."""
        return self.scale * batch + self.offset

    def __str__(self) -> str:
        head = "B" if self.scale == 1 else f"{self.scale}*B"
        return head if self.offset == 0 else f"{head}{self.offset:+d}"


Dim = int | BatchDim

SMALL = 2**21
"""Up to so many elements, kernels tell a shape: they take less time than PyTorch's shape rules."""

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a value in the graph; prints as `f32[B,64,8,8]`."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, batch: int | None = None) -> TensorSpec:
        """Read the spec of `tensor`; with `batch`, a first dimension of that size is the batch."""
        dims: list[Dim] = [int(n) for n in tensor.shape]
        if batch is not None and dims and dims[0] == batch:
            dims[0] = BatchDim()
        return cls(tuple(dims), tensor.dtype)

    def concrete(self, batch: int) -> tuple[int, ...]:
        """Return the shape in a batch of `batch` samples."""
        return tuple(d.at(batch) if isinstance(d, BatchDim) else d for d in self.shape)

    def empty(self, batch: int, device: str | torch.device = "meta") -> torch.Tensor:
        """Return an uninitialised tensor of this spec."""
        return torch.empty(self.concrete(batch), dtype=self.dtype, device=device)

    @property
    def differentiable(self) -> bool:
        """Whether a value of this dtype can carry a gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def batch_dim(self) -> int | None:
        """Index of the dimension that grows with the batch, or None for a constant."""
        found = [i for i, d in enumerate(self.shape) if isinstance(d, BatchDim)]
        return found[0] if found else None

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of one sample of a batch-first value.

        Raises:
            LoccError: the value does not have the plain batch as its first dimension alone.
        """
        rest = [d for d in self.shape[1:] if isinstance(d, int)]
        if not self.shape or self.shape[0] != BatchDim() or len(rest) != len(self.shape) - 1:
            raise LoccError(f"expected a batch-first value, found one of shape {self}")
        return tuple(rest)

    def __str__(self) -> str:
        name = _SHORT.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{name}[{','.join(str(d) for d in self.shape)}]"


Spec = Any
"""A TensorSpec, or tuples, lists and dicts of specs, or None for a value that is no tensor."""


def map_specs(function: Callable[[TensorSpec], Any], spec: Spec) -> Any:
    """Apply `function` to every TensorSpec in a nested spec."""
    if isinstance(spec, TensorSpec):
        return function(spec)
    if isinstance(spec, dict):
        return {key: map_specs(function, value) for key, value in spec.items()}
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return type(spec)(map_specs(function, value) for value in spec)  # type: ignore[call-arg]
    return None
