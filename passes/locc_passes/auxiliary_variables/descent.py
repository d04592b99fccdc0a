"""Descent on nonlinear least squares: Gauss-Newton steps that are shortened until they lower the energy."""

from __future__ import annotations

import torch
from torch import Tensor

from locc_passes.auxiliary_variables.formulas import affine, solved, solved_input, with_diagonal
from locc_passes.auxiliary_variables.products import Bend, Product

_LENGTHS = (0.0, 1.0, 0.5, 0.125)
"""Of a step, in units of the one that is right where sigma has slope 1; 0 stands for staying."""


def _lengths(like: Tensor) -> Tensor:
    """Return the lengths in a dimension in front of those of `like`."""
    return torch.tensor(_LENGTHS, dtype=like.dtype, device=like.device).view(-1, *[1] * like.dim())


def _best(energies: Tensor) -> Tensor:
    """Return the length of the least energy, for each entry behind the first dimension."""
    return torch.tensor(_LENGTHS, dtype=energies.dtype, device=energies.device)[energies.argmin(0)]


def descended_input(
    product: Product,
    bend: Bend,
    steps: int,
    rounds: int,
    v: Tensor,
    below: Tensor,
    above: Tensor,
    w: Tensor,
    b: Tensor | None,
    gamma: float,
    alpha: float,
) -> Tensor:
    """Lower gamma (||above - sigma(w V + b)||^2 + ||V - below||^2) + alpha ||V - v||^2, sample by sample."""
    old, pre, many = v, affine(product, v, w, b), (-1, *[1] * (v.dim() - 1))
    for _ in range(steps):
        slope = product.adjoint(bend.derivative(pre) * (bend(pre) - above), w, v)
        slope = gamma * (slope + v - below) + alpha * (v - old)
        ahead = -solved_input(product, rounds, torch.zeros_like(v), w, slope, gamma, gamma + alpha)
        push = product(ahead, w)
        moved, bent = v + _lengths(v) * ahead, bend(pre + _lengths(pre) * push)
        terms = ((gamma, bent - above), (gamma, moved - below), (alpha, moved - old))
        length = _best(torch.stack([f * d.square().flatten(2).sum(2) for f, d in terms]).sum(0))
        v, pre = v + length.view(many) * ahead, pre + length.view(-1, *[1] * (pre.dim() - 1)) * push
    return v


def descended_weight(
    product: Product,
    bend: Bend,
    steps: int,
    v: Tensor,
    above: Tensor,
    b: Tensor | None,
    w: Tensor,
    gamma: float,
    alpha: float,
) -> Tensor:
    """Lower gamma ||above - sigma(W v + b)||^2 + alpha ||W - w||^2, output by output."""
    pre, target = product.outputs(affine(product, v, w, b)), product.outputs(above)
    found = _descended(bend, steps, product.inputs(v), pre, target, product.matrix(w), gamma, alpha)
    return found.reshape(w.shape)


def descended_bias(
    product: Product,
    bend: Bend,
    steps: int,
    v: Tensor,
    above: Tensor,
    w: Tensor,
    b: Tensor,
    gamma: float,
    alpha: float,
) -> Tensor:
    """Lower gamma ||above - sigma(w v + B)||^2 + alpha ||B - b||^2, entry by entry."""
    pre, target = product.outputs(affine(product, v, w, b)), product.outputs(above)
    ones, matrix = torch.ones_like(pre[..., :1]), b.reshape(len(pre), -1, 1)
    return _descended(bend, steps, ones, pre, target, matrix, gamma, alpha).reshape(b.shape)


def _descended(
    bend: Bend, steps: int, x: Tensor, pre: Tensor, target: Tensor, w: Tensor, gamma: float, alpha: float
) -> Tensor:
    """Do the same for matrices: x [groups, rows, inputs], pre and target [.., outputs], w [.., inputs]."""
    old, gram = w, with_diagonal(gamma * (x.mT @ x), alpha)
    for _ in range(steps):
        slope = gamma * (bend.derivative(pre) * (bend(pre) - target)).mT @ x + alpha * (w - old)
        ahead = -solved(gram, slope.mT).mT
        push = x @ ahead.mT
        moved, bent = w + _lengths(w) * ahead, bend(pre + _lengths(pre) * push)
        energies = gamma * (bent - target).square().sum(2) + alpha * (moved - old).square().sum(3)
        length = _best(energies)
        w, pre = w + length[..., None] * ahead, pre + length[:, None] * push
    return w
