"""Values of a batch taken apart into one row for each sample, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from locc.ir.spec import BatchDim, Spec, TensorSpec


def row_dim(spec: Spec) -> int | None:
    """Return the dimension along which the samples of a value lie; None where it has no such rows."""
    if not isinstance(spec, TensorSpec):
        return None
    found = [(i, d) for i, d in enumerate(spec.shape) if isinstance(d, BatchDim)]
    return found[0][0] if len(found) == 1 and found[0][1].offset == 0 else None


def row_dims(spec: Spec) -> list[int] | None:
    """Return the same for each tensor of a nested value; None where one has no rows."""
    found = [row_dim(leaf) for leaf in tree_leaves(spec)]
    return None if None in found else [d for d in found if d is not None]


def pick(value: Tensor, dim: int, batch: int, samples: Sequence[int]) -> Tensor:
    """Return the value of some of the samples, each with all of its entries along `dim`."""
    each = value.shape[dim] // batch
    chosen = torch.tensor(samples, device=value.device)
    found: Tensor = value.unflatten(dim, (batch, each)).index_select(dim, chosen)
    return found.flatten(dim, dim + 1)


@dataclass(frozen=True)
class Layout:
    """How the values of a batch lie in memory, for each tensor; what is put together lies in the same way.

    Attributes:
        dim: along which the samples lie.
        each: how many entries along it a sample has.
        order: the dimensions from the outermost in memory to the innermost.
        shape: of a sample's row, in that order.
        dtype: of the tensor.
    """

    dim: int
    each: int
    order: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor, dim: int, batch: int) -> Layout:
        """Read the layout off a value."""
        each = value.shape[dim] // batch
        split: Tensor = value if each == 1 else value.unflatten(dim, (batch, each))
        order = sorted(range(split.dim()), key=split.stride().__getitem__, reverse=True)
        return cls(dim, each, tuple(order), tuple(split.shape[d] for d in order if d != dim), value.dtype)

    @property
    def size(self) -> int:
        """Bytes of a sample's row."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def apart(self, value: Tensor, batch: int) -> Tensor:
        """Return the bytes of the samples, [batch, size]."""
        split = value if self.each == 1 else value.unflatten(self.dim, (batch, self.each))
        rows = split.permute(self.order).movedim(self.order.index(self.dim), 0)
        plain = rows.resolve_conj().resolve_neg().contiguous()
        return plain.view(batch, torch.Size(self.shape).numel()).view(torch.uint8)

    def together(self, rows: Tensor) -> Tensor:
        """Return the value whose samples have these bytes."""
        batch = rows.shape[0]
        found = rows.contiguous().view(self.dtype).view(batch, *self.shape)
        found = found.movedim(0, self.order.index(self.dim)).contiguous()
        found = found.permute(sorted(range(len(self.order)), key=self.order.__getitem__))
        return found if self.each == 1 else found.flatten(self.dim, self.dim + 1)


def close(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether tensors are the same up to the rounding of their dtype."""
    return all(_close(a, b) for a, b in zip(first, second, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() and not a.is_complex():
        return torch.equal(a, b)
    scale = a.abs().nan_to_num(0.0, 0.0).max().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=torch.finfo(a.dtype).eps ** 0.5 * scale, equal_nan=True)
