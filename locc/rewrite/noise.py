"""Noise on a value of the graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from locc.ir import TrainingGraph


def disturb(ir: TrainingGraph, owner: str, value: fx.Node, sigma: float) -> fx.Node:
    """Return value + e with e ~ N(0, sigma^2), a node of `owner` in the value's shape.

    `value` must be the owner's own or brought in by `ir.stop_gradient`. The node is marked as random: its
    noise follows the program's seed and step, as dropout does.
    """
    return ir.emit(owner, with_noise, value, sigma, role="noise")


def draw(ir: TrainingGraph, owner: str, value: fx.Node, sigma: float) -> fx.Node:
    """Return e ~ N(0, sigma^2) in a value's shape: what `disturb` would add, as a node of `owner`."""
    return ir.emit(owner, gaussian, value, sigma, role="noise")


def with_noise(h: Tensor, sigma: float) -> Tensor:
    """Return h + e with e ~ N(0, sigma^2)."""
    return h + sigma * torch.randn_like(h)


def gaussian(h: Tensor, sigma: float) -> Tensor:
    """Return e ~ N(0, sigma^2) in the shape of h."""
    return sigma * torch.randn_like(h)
