"""Shapes that know which of their dimensions is the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from locc.errors import LoccError


@dataclass(frozen=True)
class FreeDim:
    """A dimension that may vary from batch to batch, other than the batch: time, height, a number of points.

    Two are equal where they have the same sizes in the example and in the second call that capture makes with
    all free dimensions of the inputs at other sizes.

    Attributes:
        name: how it follows from the free dimensions of the inputs, for the reader: `T`, `H/2` (rounded up).
        size: in the example.
        other: in that second call.
    """

    name: str = field(compare=False)
    size: int
    other: int

    def at(self, probe: int) -> int:
        """Return the size in the example (0) or in the second call (1)."""
        return self.other if probe else self.size

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class BatchDim:
    """A dimension of size `scale * B + offset`, where B is the batch size."""

    scale: int | FreeDim = 1
    offset: int = 0

    def rows(self, probe: int = 0) -> int:
        """Return how many entries each sample adds."""
        return self.scale.at(probe) if isinstance(self.scale, FreeDim) else self.scale

    def at(self, batch: int, probe: int = 0) -> int:
        """Return the size of this dimension in a batch of `batch` samples."""
        return self.rows(probe) * batch + self.offset

    def __str__(self) -> str:
        head = "B" if self.scale == 1 else f"{self.scale}*B"
        return head if self.offset == 0 else f"{head}{self.offset:+d}"


Dim = int | BatchDim | FreeDim


@dataclass(frozen=True)
class Point:
    """Sizes at which something is tried.

    Attributes:
        batch: number of samples; None where no dimension is the batch.
        probe: 0 with the free dimensions as in the example, 1 with all of them at other sizes.
    """

    batch: int | None
    probe: int = 0


def fit(seen: Mapping[Point, tuple[int, ...]], known: Iterable[FreeDim]) -> tuple[Dim, ...] | None:
    """Return the dims that have the sizes seen at one to three points, or None where none have.

    Args:
        seen: the shape at a first point; at another batch size; and at other sizes of the free dimensions,
            with the first batch size.
        known: free dimensions that a size may follow from, for its name.
    """
    (first, base), *rest = seen.items()
    if any(len(shape) != len(base) for _, shape in rest):
        return None
    other = next((shape for point, shape in rest if point.probe), base)
    batch, grown = next(((p.batch, s) for p, s in rest if not p.probe), (first.batch, base))
    known = list(known)
    dims = [
        _dim(size, grown[i], other[i], first.batch or 0, batch or 0, known) for i, size in enumerate(base)
    ]
    return None if None in dims else tuple(d for d in dims if d is not None)


def _dim(a: int, grown: int, other: int, first: int, second: int, known: list[FreeDim]) -> Dim | None:
    scale, rest = divmod(grown - a, second - first) if second != first else (0, 0)
    if rest or scale < 0:
        return None
    offset = a - scale * first
    if other == a:
        return BatchDim(scale, offset) if scale else a
    if not scale:
        return FreeDim(_name(a, other, known), a, other)
    if offset or other % first:
        return None
    return BatchDim(FreeDim(_name(scale, other // first, known), scale, other // first))


def _name(size: int, other: int, known: list[FreeDim]) -> str:
    """Return an expression in the known dimensions that has both sizes."""
    for dim in known:
        if (dim.size, dim.other) == (size, other):
            return dim.name
    for dim in known:
        if other - dim.other == size - dim.size:
            return f"{dim.name}{size - dim.size:+d}"
        factor, divisor = size // dim.size, -(-dim.size // max(size, 1))
        if (factor * dim.size, factor * dim.other) == (size, other):
            return f"{factor}*{dim.name}"
        if (-(-dim.size // divisor), -(-dim.other // divisor)) == (size, other):
            return f"{dim.name}/{divisor}"
    for one, two in itertools.combinations_with_replacement(known, 2):
        if (one.size * two.size, one.other * two.other) == (size, other):
            return f"{one.name}*{two.name}"
    return "?"


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

    def concrete(self, batch: int, probe: int = 0) -> tuple[int, ...]:
        """Return the shape in a batch of `batch` samples, at the example's sizes of what else may vary."""
        return tuple(
            d.at(batch, probe) if isinstance(d, BatchDim) else d.at(probe) if isinstance(d, FreeDim) else d
            for d in self.shape
        )

    def named(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of an input: the batch size is called `B`, free dimensions go by their names."""
        return tuple(
            d if isinstance(d, int) else sizes.get("B" if isinstance(d, BatchDim) else d.name, -1)
            for d in self.shape
        )

    def empty(self, batch: int, device: str | torch.device = "meta") -> torch.Tensor:
        """Return an uninitialised tensor of this spec."""
        return torch.empty(self.concrete(batch), dtype=self.dtype, device=device)

    @property
    def free(self) -> list[FreeDim]:
        """What may vary from batch to batch, other than the batch."""
        scales = [d.scale if isinstance(d, BatchDim) else d for d in self.shape]
        return [d for d in scales if isinstance(d, FreeDim)]

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
            LoccError: the value does not have the plain batch as its first dimension alone, or another one
                may vary.
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
