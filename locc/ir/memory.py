"""Which tensors lie in the same memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves


def memory_of(tensor: Tensor) -> int:
    """Return what is equal for tensors that lie in the same storage."""
    return memory_of_storage(tensor.untyped_storage())


def memory_of_storage(storage: UntypedStorage) -> int:
    """Return what `memory_of` does for a tensor that lies in a storage."""
    return int(storage._cdata)


def memories(value: Any) -> set[int]:
    """Return the memory of each tensor of a value that may be nested."""
    if isinstance(value, Tensor):  # most are, and this is asked at every update
        return {memory_of(value)}
    return {memory_of(v) for v in tree_leaves(value) if isinstance(v, Tensor)}


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the ranges that two tensors span in a storage have an element in common."""
    if memory_of(one) != memory_of(other):
        return False
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _span(tensor: Tensor) -> tuple[int, int]:
    start, size = int(tensor.storage_offset()), tensor.element_size()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + last + 1) * size if tensor.numel() else start * size
