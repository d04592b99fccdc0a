"""The two halves of a layer for block methods: a product with the weight, and a nonlinearity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_STEPS = 6
"""Of the search for a number u, where it has no closed form."""


@dataclass(frozen=True)
class Reshape:
    """Gives each sample another shape."""

    features: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, *features]."""
        return x.reshape(x.shape[0], *self.features)


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input; as the arguments of `nn.Conv2d`."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Product:
    """W * v, a linear layer or a convolution without its bias, as a linear map of v and of W.

    `before` are the linear maps without parameters that v passes first (flattening, average pooling).
    Matrices have a leading dimension, one for each of the convolution's groups.
    """

    before: tuple[Callable[[Tensor], Tensor], ...] = ()
    window: Window | None = None

    @property
    def dense(self) -> bool:
        """Whether W * v is a matrix product for each row of v, which can be solved for v."""
        return self.window is None and all(isinstance(m, Reshape) for m in self.before)

    def __call__(self, v: Tensor, w: Tensor) -> Tensor:
        """Return W * v."""
        x = self._read(v)
        if self.window is None:
            return functional.linear(x, w)
        at = self.window
        return functional.conv2d(x, w, None, at.stride, at.padding, at.dilation, at.groups)

    def adjoint(self, u: Tensor, w: Tensor, v: Tensor) -> Tensor:
        """Return the transposed map of v -> W * v at `u`, in the shape of `v`."""
        if self.dense:
            return (u @ w).reshape(v.shape)
        (found,) = torch.func.vjp(lambda x: self(x, w), v)[1](u)
        assert isinstance(found, Tensor)
        return found

    def inputs(self, v: Tensor) -> Tensor:
        """Return what each output position reads, as rows [groups, rows, inputs]: the design matrix of W."""
        x, at = self._read(v), self.window
        if at is None:
            return x.reshape(1, -1, x.shape[-1])
        patches = functional.unfold(x, at.size, at.dilation, at.padding, at.stride)
        batch, _, positions = patches.shape
        split = patches.reshape(batch, at.groups, -1, positions)
        return split.permute(1, 0, 3, 2).reshape(at.groups, batch * positions, -1)

    def outputs(self, u: Tensor) -> Tensor:
        """Return what has the shape of W * v as rows [groups, rows, outputs], in the order of `inputs`."""
        if self.window is None:
            return u.reshape(1, -1, u.shape[-1])
        groups = self.window.groups
        split = u.reshape(u.shape[0], groups, u.shape[1] // groups, -1)
        return split.permute(1, 0, 3, 2).reshape(groups, -1, u.shape[1] // groups)

    def matrix(self, w: Tensor) -> Tensor:
        """Return the weight as [groups, outputs, inputs]; `reshape(w.shape)` undoes it."""
        groups = 1 if self.window is None else self.window.groups
        return w.reshape(groups, w.shape[0] // groups, -1)

    def spread(self, b: Tensor | None) -> Tensor | float:
        """Return a bias [outputs] so that it can be added to W * v; 0 where there is none."""
        if b is None:
            return 0.0
        return b if self.window is None else b[:, None, None]

    def total(self, u: Tensor) -> Tensor:
        """Return the sum of `u`, of the shape of W * v, for each entry of the bias [outputs]."""
        return u.flatten(0, -2).sum(0) if self.window is None else u.sum((0, 2, 3))

    def _read(self, v: Tensor) -> Tensor:
        for step in self.before:
            v = step(v)
        return v


def product_of(layer: nn.Module, before: tuple[Callable[[Tensor], Tensor], ...]) -> Product:
    """Return the product of an `nn.Linear` or an `nn.Conv2d`."""
    if isinstance(layer, nn.Linear):
        return Product(before)
    assert isinstance(layer, nn.Conv2d)

    def pair(values: object) -> tuple[int, int]:
        assert isinstance(values, tuple)
        return values

    size, stride, padding = pair(layer.kernel_size), pair(layer.stride), pair(layer.padding)
    return Product(before, Window(size, stride, padding, pair(layer.dilation), layer.groups))


@dataclass(frozen=True)
class Bend:
    """A nonlinearity that acts on each number by itself.

    `slope` is its slope below zero where it is the identity above: 0 for a ReLU, 1 for none at all. Without
    one, there is no closed form of `prox`, and some damped Gauss-Newton steps take its place.
    """

    function: Callable[[Tensor], Tensor] | None = None
    slope: float | None = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        """Return sigma(u)."""
        return u if self.function is None else self.function(u)

    def derivative(self, u: Tensor) -> Tensor:
        """Return sigma'(u)."""
        if self.slope is not None:
            return torch.where(u > 0, torch.ones_like(u), torch.full_like(u, self.slope))
        (found,) = torch.func.vjp(self, u)[1](torch.ones_like(u))
        assert isinstance(found, Tensor)
        return found

    def prox(self, a: Tensor, b: Tensor, weight: float, start: Tensor) -> Tensor:
        """Return argmin over u of (sigma(u) - a)^2 / 2 + weight / 2 (u - b)^2, number by number.

        Args:
            a: what sigma(u) should be.
            b: what u should be.
            weight: of the second term, above 0.
            start: where a search may begin, unless `b` is better; what it finds is never worse.
        """

        def energy(u: Tensor) -> Tensor:
            return (self(u) - a) ** 2 + weight * (u - b) ** 2

        if self.slope is not None:
            above = ((a + weight * b) / (1 + weight)).clamp(min=0)
            below = ((self.slope * a + weight * b) / (self.slope**2 + weight)).clamp(max=0)
            return torch.where(energy(above) < energy(below), above, below)
        best, lowest, length = start, energy(start), torch.ones_like(b)
        closer = energy(b) < lowest
        best, lowest = torch.where(closer, b, best), torch.minimum(energy(b), lowest)
        for _ in range(_STEPS):
            slope = self.derivative(best)
            step = (slope * (a - self(best)) + weight * (b - best)) / (slope**2 + weight)
            moved = best + length * step
            found = energy(moved)
            better = found < lowest
            best, lowest = torch.where(better, moved, best), torch.where(better, found, lowest)
            length = torch.where(better, 1.0, length / 4)
        return best
