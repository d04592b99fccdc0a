"""What the formulas of the methods in time have in common, in NumPy and without autograd."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, np.dtype[np.float64]]


def chain(*widths: int) -> nn.Sequential:
    """Return float64 layers l1, l2, .., with a tanh after each but the last, as t1, t2, .."""
    model = nn.Sequential()
    for i, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        model.add_module(f"l{i}", nn.Linear(before, after, dtype=torch.float64))
        if i < len(widths) - 1:
            model.add_module(f"t{i}", nn.Tanh())
    return model


def batches(count: int, size: int, width: int, classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return different batches of inputs [size,width] and class ids [size]."""
    draw = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, width, generator=draw, dtype=torch.float64),
            torch.randint(classes, (size,), generator=draw),
        )
        for _ in range(count)
    ]


class Layer:
    """A linear layer with SGD: z = a W' + b."""

    def __init__(self, layer: nn.Module, rate: float) -> None:
        self.w, self.b = (p.detach().numpy().copy() for p in layer.parameters())
        self.rate = rate

    def __call__(self, a: Array) -> Array:
        return a @ self.w.T + self.b

    def moved(self, a: Array, dz: Array) -> tuple[Array, Array]:
        """Return the weight and bias after a step on a gradient dz of z."""
        return self.w - self.rate * dz.T @ a, self.b - self.rate * dz.sum(0)

    def set(self, values: tuple[Array, Array]) -> None:
        self.w, self.b = values

    def differs(self, layer: nn.Module) -> float:
        """Return the largest difference of a parameter from that of a module."""
        pairs = zip((self.w, self.b), layer.parameters(), strict=True)
        return max(float(np.abs(mine - p.detach().numpy()).max()) for mine, p in pairs)


def error(logits: Array, y: Array) -> Array:
    """Return the gradient of the mean cross-entropy with respect to the logits [B,C]."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True) - np.eye(logits.shape[1])[y]) / len(y)
