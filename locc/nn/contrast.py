"""Losses between the samples of a batch: supervised contrast, kernels of pairs, and predictive coding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locc.ir.spec import TensorSpec
from locc.nn.building import placement
from locc.nn.layout import Layout, guess_layout, resize


def supervised_contrast(z: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Return the supervised contrastive loss (shape []) of one view of each sample.

    Features are normalised; each sample is an anchor, the others of its class its positives. An anchor
    without positives counts as zero in the mean. Khosla et al. 2020 as InfoPro's released code has it.

    Args:
        z: [B,D].
        labels: class ids [B].
        temperature: of the softmax over the other samples.
    """
    unit = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = (unit @ unit.t() / temperature).masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    log_p = scores - scores.logsumexp(1, keepdim=True)
    return -_mean_where(log_p, positive, 1).mean()


def pair_kernel(g: Tensor, feature: str, pool: int) -> Tensor:
    """Return the cosines K [B,B] of the features phi(g) of a module's output.

    Args:
        g: [B,D] or [B,D,*positions].
        feature: phi, of `FEATURES`.
        pool: side of the windows in which phi(g) of a map is averaged; a smaller map is averaged whole.
    """
    value = FEATURES[feature][0](g)
    if value.dim() > 2 and pool > 1:
        value = resize(value, tuple(max(1, n // pool) for n in value.shape[2:]))
    unit = F.normalize(value.flatten(1), dim=1, eps=1e-12)
    return unit @ unit.t()


FEATURES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, 0.0),
    "sigmoid": (torch.sigmoid, 0.0),
    "tanh": (torch.tanh, -1.0),
    "identity": (nn.Identity(), -1.0),
    "positive": (nn.Identity(), 0.0),
}
"""phi by name, and the least cosine of two of its values; "positive" is the identity, of values that are."""

PAIR_OBJECTIVES = ("alignment", "nmse", "contrastive", "raw")


def pair_loss(kernel: Tensor, labels: Tensor, objective: str, least: float, pull: bool) -> Tensor:
    """Return the loss (shape []) of a kernel matrix over the pairs i < j of a batch.

    With the target K* = 1 for two samples of one class and `least` otherwise, the loss is minus the alignment
    sum(K K*) / (|K| |K*|); the mean of (K - K*)^2; minus the log of the share that pairs of one class have in
    sum(exp K); or the mean of K over pairs of two classes, less its sum over those of one. Duan, Yu &
    Principe, "Modularizing deep learning via pairwise learning with kernels". Without `pull` only pairs of
    two classes count (their Eq. 1). A batch without pairs of a kind gives zero for it.

    Args:
        kernel: K [B,B].
        labels: class ids [B].
        objective: of `PAIR_OBJECTIVES`.
        least: the least value K can have.
        pull: count the pairs of one class too.
    """
    above = torch.ones_like(kernel, dtype=torch.bool).triu(1)
    same = labels[:, None] == labels[None, :]
    pairs = (above if pull else above & ~same).to(kernel.dtype)
    wanted = torch.where(same, 1.0, least).to(kernel.dtype)
    if objective == "alignment":
        norms = (kernel * pairs).square().sum() * (wanted * pairs).square().sum()
        return -(kernel * wanted * pairs).sum() * norms.clamp_min(1e-24).rsqrt()
    if objective == "nmse":
        return ((kernel - wanted).square() * pairs).sum() / pairs.sum().clamp_min(1)
    alike, unlike = (above & same).to(kernel.dtype), (above & ~same).to(kernel.dtype)
    if objective == "raw":
        return ((kernel * unlike).sum() - pull * (kernel * alike).sum()) / pairs.sum().clamp_min(1)
    if not pull:
        return (kernel.exp() * unlike).sum() / unlike.sum().clamp_min(1)
    share = (kernel.exp() * alike).sum() / (kernel.exp() * above).sum().clamp_min(1e-12)
    return torch.where(share > 0, -share.clamp_min(1e-12).log(), torch.zeros_like(share))


def gaussian_kernel(g: Tensor, sigma: float) -> Tensor:
    """Return exp(-||u - v||^2 / (2 sigma^2)) [B,B] of the rows of g [B,...], sigma in units of their spread.

    The spread is the root of the mean square distance between two rows, and is differentiated: held fixed, it
    would let rows that all move apart seem to come nearer a small kernel, which the next spread undoes.
    """
    rows = g.flatten(1)
    square = rows.square().sum(1)
    distance = (square[:, None] + square[None, :] - 2 * rows @ rows.t()).clamp_min(0)
    scale = distance.mean().clamp_min(1e-12)
    return (-distance / (2 * sigma**2 * scale)).exp()


def matrix_loss(kernel: Tensor, labels: Tensor, objective: str) -> Tensor:
    """Return the loss (shape []) of a whole kernel matrix, its target 1 for one class and 0 for two.

    "cosine" is minus the cosine of the two matrices, "mse" the mean square of their difference over all B^2
    entries. Duan et al., "On kernel method-based connectionist models".
    """
    wanted = (labels[:, None] == labels[None, :]).to(kernel.dtype)
    if objective == "mse":
        return F.mse_loss(kernel, wanted)
    return -F.cosine_similarity(kernel.flatten(), wanted.flatten(), dim=0)


def patch_grid(patches: int) -> tuple[int, int]:
    """Return the rows and columns of so many patches, as near to a square as their number allows."""
    rows = next(n for n in range(math.isqrt(patches), 0, -1) if patches % n == 0)
    return rows, patches // rows


class PredictiveCoding(nn.Module):
    """InfoNCE between positions of a map or a sequence: the loss of a module without labels.

    For j = 1..steps: score = (W_j z_{r+j+skip,c})^T z_{r,c}, softmax over it and `negatives` others, drawn
    with replacement from the rows r+j+skip of all r, c and samples: what is never predicted is no negative.
    The loss is the mean of -log p over positions and j. Lowe, O'Connor & Veeling, "Putting an end to
    end-to-end" (2019), released code. z is the boundary itself: a map averaged to at most `grid` x `grid`
    positions and predicted downwards, or a sequence predicted forwards. Patches that are folded into the
    batch, [B*P,...], are a grid (`patch_grid`), and give the mean of each map.
    """

    def __init__(
        self,
        spec: TensorSpec,
        *,
        steps: int = 5,
        skip: int = 1,
        negatives: int = 16,
        grid: int = 7,
        layout: Layout | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = guess_layout(spec, layout)
        dim = spec.shape[self.layout.batch_dim]
        self.patches = dim.rows() if hasattr(dim, "rows") else 1
        width = self.layout.channels(spec)
        sizes = self.layout.sizes(spec)
        if self.patches > 1:
            self.rows: tuple[int, ...] = patch_grid(self.patches)
        else:
            limit = grid if self.layout.kind == "image" else max(sizes, default=1)
            self.rows = tuple(min(n, limit) for n in sizes)
        length = self.rows[0] if self.rows else 1
        self.skip = min(skip, max(length - 2, 0))
        self.negatives = negatives
        at = placement(spec, device, dtype)
        steps = max(0, min(steps, length - 1 - self.skip))
        self.maps = nn.ModuleList([nn.Linear(width, width, bias=False, **at) for _ in range(steps)])

    def latents(self, h: Tensor) -> Tensor:
        """Return z [B,R,C,D] of the boundary `h`: rows in which to predict, columns beside each other."""
        z = self.layout.first(h)
        if self.patches > 1:
            pooled: Tensor = z.flatten(2).mean(2) if z.dim() > 2 else z
            return torch.unflatten(pooled, 0, (-1, *self.rows))
        if self.layout.kind == "image":
            z = resize(z, self.rows)
        return torch.unflatten(z.flatten(2).movedim(1, -1), 1, (z.shape[2], -1))

    def forward(self, h: Tensor) -> Tensor:
        """Return the loss, shape []; a sequence too short for a step leaves it out, and has 0 without any."""
        z = self.latents(h)
        losses = []
        for j, mapped in enumerate(self.maps, start=1):
            ahead = j + self.skip
            if ahead >= z.shape[1]:
                break
            context, future = z[:, :-ahead], mapped(z[:, ahead:])
            others = future.flatten(0, 2)
            drawn = torch.randint(len(others), (*context.shape[:3], self.negatives), device=z.device)
            scores = torch.cat([future.unsqueeze(3), others[drawn]], 3) @ context.unsqueeze(4)
            losses.append(-(scores.squeeze(4).softmax(3)[..., 0] + 1e-11).log().mean())
        return torch.stack(losses).mean() if losses else 0 * z.sum()


def _mean_where(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Return the mean of the entries of `x` under a mask along a dimension; zero where there is none."""
    return torch.where(mask, x, 0).sum(dim) / mask.sum(dim).clamp_min(1)
