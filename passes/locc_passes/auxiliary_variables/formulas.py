"""Block updates in closed form, or by an inner solver where there is none: sums over samples, no means."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from locc.nn import one_hot
from locc_passes.auxiliary_variables.products import Bend, Product

OUTPUTS = ("squared", "hinge", "cross_entropy")
_FISTA_ROUNDS, _FISTA_CHANGE, _FISTA_STEP = 500, 1e-3, 4.0


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Return X with matrix X = right, for positive definite matrices [..., d, d], by Cholesky."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def with_diagonal(matrix: Tensor, weight: float) -> Tensor:
    """Return matrix + weight I."""
    return matrix + weight * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def affine(product: Product, v: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return W v + b."""
    return product(v, w) + product.spread(b)


def fitted_weight(
    product: Product, v: Tensor, u: Tensor, b: Tensor | None, w: Tensor, rho: float, alpha: float
) -> Tensor:
    """Return argmin over W of rho ||u - b - W v||^2 + alpha ||W - w||^2, alpha above 0."""
    x, t = product.inputs(v), product.outputs(u - product.spread(b))
    gram = with_diagonal(rho * (x.mT @ x), alpha)
    right = rho * (x.mT @ t) + alpha * product.matrix(w).mT
    return solved(gram, right).mT.reshape(w.shape)


def fitted_bias(
    product: Product, v: Tensor, u: Tensor, w: Tensor, b: Tensor, rho: float, alpha: float
) -> Tensor:
    """Return argmin over b of rho ||u - b - w v||^2 + alpha ||b - old b||^2."""
    rest = u - product(v, w)
    return (alpha * b + rho * product.total(rest)) / (rho * (rest.numel() // len(b)) + alpha)


def solved_input(
    product: Product, rounds: int, v: Tensor, w: Tensor, right: Tensor, rho: float, gamma: float
) -> Tensor:
    """Return V with (rho A'A + gamma) V = right, A the map V -> w V.

    Where w V is no matrix product of each row (a convolution, a pooled input), some rounds of conjugate
    gradients from `v`: each lowers the quadratic of which this is the minimum.
    """
    if product.dense:
        system = with_diagonal(rho * (w.mT @ w), gamma)
        return solved(system, right.reshape(-1, w.shape[1]).mT).mT.reshape(v.shape)

    def system_of(x: Tensor) -> Tensor:
        return rho * product.adjoint(product(x, w), w, x) + gamma * x

    rest = right - system_of(v)
    ahead, size = rest, rest.square().sum()
    tiny = torch.finfo(v.dtype).tiny
    for _ in range(rounds):
        pushed = system_of(ahead)
        step = size / (ahead * pushed).sum().clamp(min=tiny)
        v, rest = v + step * ahead, rest - step * pushed
        before, size = size, rest.square().sum()
        ahead = rest + size / before.clamp(min=tiny) * ahead
    return v


def fitted_input(
    product: Product,
    bend: Bend,
    rounds: int,
    v: Tensor,
    below: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor | None,
    rho: float,
    gamma: float,
) -> Tensor:
    """Return argmin over V of rho ||u - b - w V||^2 + gamma ||V - sigma(below)||^2; it may begin at `v`."""
    right = rho * product.adjoint(u - product.spread(b), w, v) + gamma * bend(below)
    return solved_input(product, rounds, v, w, right, rho, gamma)


def bent(bend: Bend, a: Tensor, center: Tensor, weight: float, start: Tensor) -> Tensor:
    """Return argmin over U of ||a - sigma(U)||^2 + weight ||U - center||^2; see `Bend.prox`."""
    return bend.prox(a, center, weight, start)


def applied(bend: Bend, u: Tensor) -> Tensor:
    """Return sigma(u)."""
    return bend(u)


def bent_product(product: Product, bend: Bend, v: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return sigma(w v + b)."""
    return bend(affine(product, v, w, b))


def mean_of(a: Tensor, weight: float, b: Tensor, other: float) -> Tensor:
    """Return the mean of two values, weighted."""
    return (weight * a + other * b) / (weight + other)


def labels(dim: int, target: Tensor, output: Tensor) -> Tensor:
    """Return the target in the shape of the output, whose classes are in dimension `dim`: one-hot for ids."""
    if target.is_floating_point():
        return target.to(output.dtype)
    return one_hot(target, output.shape[dim], dtype=output.dtype).movedim(-1, dim)


def output_step(
    kind: str, dim: int, start: Tensor, center: Tensor, weight: Tensor | float, y: Tensor
) -> Tensor:
    """Return argmin over z of loss(z, y) + weight / 2 ||z - center||^2, summed over samples.

    Args:
        kind: "squared", ||z - y||^2 / 2; "hinge", sum of max(1 - z, 0) where y is 1 and of max(z, 0) where it
            is 0; "cross_entropy", of softmax(z) with y, by FISTA from `start`.
        dim: where the classes are.
        start: where FISTA begins.
        center: of the second term, in the shape of z.
        weight: of the second term, above 0.
        y: the labels in the shape of z.
    """
    if kind == "squared":
        return (y + weight * center) / (1 + weight)
    if kind == "hinge":
        # Towards 1 for the class and towards 0 for the others, by at most 1 / weight and never beyond.
        risen = torch.maximum(center, (center + 1 / weight).clamp(max=1))
        fallen = torch.minimum(center, (center - 1 / weight).clamp(min=0))
        return torch.where(y > 0.5, risen, fallen)
    return _fista(start, center, weight, y, dim)


def _fista(z: Tensor, center: Tensor, weight: Tensor | float, y: Tensor, dim: int) -> Tensor:
    """Minimise cross-entropy + weight / 2 ||z - center||^2 by the rule of dlADMM's authors."""
    momentum, ahead, value = 1.0, z, math.inf
    for _ in range(_FISTA_ROUNDS):
        cross = -(y * functional.log_softmax(z, dim)).sum()
        before, value = value, float(cross + weight / 2 * (z - center).square().sum())
        if abs(value - before) < _FISTA_CHANGE:
            break
        earlier, momentum = momentum, (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        share = (1 - earlier) / momentum
        descended = z / _FISTA_STEP - (functional.softmax(z, dim) - y)
        last, ahead = ahead, (weight * center + descended) / (weight + 1 / _FISTA_STEP)
        z = (1 - share) * ahead + share * last
    return z
