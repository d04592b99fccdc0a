"""Local error signals: the prediction head, the similarity head and the similarity loss.

Nøkland & Eidnes, "Training neural networks with local error signals" (ICML 2019), and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locc.ir.spec import TensorSpec
from locc.nn.building import CONV, check_shapes, placement, zero_
from locc.nn.feedback import feedback_linear
from locc.nn.layout import Layout, ceil_div, guess_layout, pool_kernel, pooled
from locc.nn.readout import Head, HeadOptions, Readout, classifier

_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Pooling(nn.Module):
    """Averages a map until it has at most `limit` features, and flattens it; `features` is what is left.

    The kernel is the smallest of `pool_kernel`. Flat values, class tokens and values that are read at every
    position pass as `Readout.read` gives them.
    """

    def __init__(self, plan: Readout, spec: TensorSpec, limit: int) -> None:
        super().__init__()
        self.plan, self.features = plan, plan.in_features
        self.pool: nn.Module | None = None
        if plan.layout.kind != "flat" and not plan.layout.class_token and not plan.per_position:
            sizes = plan.layout.sizes(spec) if plan.folded_in == 1 else (plan.folded_in,)
            kernel = pool_kernel(self.features, sizes, limit)
            pool: Any = _AVG_POOL[len(sizes)]
            # The last window may be smaller; its mean is over what it covers.
            self.pool = pool(kernel, ceil_mode=True, count_include_pad=False)
            self.features *= math.prod(map(ceil_div, sizes, kernel))

    def forward(self, h: Tensor) -> Tensor:
        """Return the rows of the boundary `h`, [B,features] or [B,*positions,features]."""
        if self.pool is None:
            return self.plan.read(h)
        pooled: Tensor = self.pool(self.plan.layout.first(self.plan.unfold(h)))
        return pooled.flatten(1)


class PredHead(Head):
    """The classifier of `pred`: average pooling, flatten, linear with zero-initialised weight.

    The pooling is that of `Pooling` with `dim_in_decoder` features. With `feedback` errors go back through a
    matrix B ~ U(+-1/sqrt(features)) that is drawn once, instead of the weight; the bias starts at zero too.
    """

    feedback: Tensor | None
    linear: Any

    def __init__(
        self,
        spec: TensorSpec,
        output: TensorSpec,
        *,
        dim_in_decoder: int = 4096,
        feedback: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(spec, output, **options)
        self.pool = Pooling(self.readout, spec, dim_in_decoder)
        at = placement(spec, **options)
        self.linear = classifier(self.pool.features, self.readout.out_features, options.get("rank"), **at)
        drawn = self.linear.weight.detach().clone() if feedback else None  # the law of nn.Linear
        self.register_buffer("feedback", drawn)
        zero_(self.linear[-1] if isinstance(self.linear, nn.Sequential) else self.linear, bias=feedback)

    def rows(self, h: Tensor) -> Tensor:
        """Return the classifier's result."""
        x: Tensor = self.pool(h)
        if self.feedback is not None:
            return feedback_linear(x, self.linear.weight, self.linear.bias, self.feedback)
        y: Tensor = self.linear(x)
        return y


class SimHead(nn.Module):
    """The map z(h) of `sim`: linear n->n, conv 3x3 with the same channels, or linear per position; no bias.

    Returns z as [B,D] or [B,D,*positions] whatever the boundary's layout: the form `similarity_matrix`
    takes. A sequence has no kernel over time, so that a causal model stays causal. With `bare` z is h itself,
    a map averaged until it has that many features at most, as `Pooling` does.
    """

    def __init__(
        self,
        spec: TensorSpec,
        *,
        bare: float | None = None,
        layout: Layout | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = guess_layout(spec, layout)
        width = self.layout.channels(spec)
        at: Any = placement(spec, device, dtype)
        self.map: nn.Module
        if bare is not None and self.layout.kind == "image":
            sizes = self.layout.sizes(spec)
            pool: Any = _AVG_POOL[len(sizes)]
            kernel = pool_kernel(width, sizes, bare)
            self.map = pool(kernel, ceil_mode=True, count_include_pad=False)
        elif bare is not None:
            self.map = nn.Identity()
        elif self.layout.kind == "image":
            self.map = CONV[len(self.layout.position_dims)](width, width, 3, padding=1, bias=False, **at)
        else:
            self.map = nn.Linear(width, width, bias=False, **at)

    def forward(self, h: Tensor) -> Tensor:
        """Map the boundary `h` to z, [B,D] or [B,D,*positions]."""
        if self.layout.kind == "image":
            z: Tensor = self.map(self.layout.first(h))
            return z
        return torch.movedim(self.map(self.layout.last(h)), -1, 1)


def build_pred_head(spec: TensorSpec, output: TensorSpec, **options: Any) -> nn.Module:
    """Build a checked `PredHead`; `options` are its keywords."""
    head = PredHead(spec, output, **options)
    check_shapes(head, (spec,), output, "the prediction head")
    return head


def build_sim_head(spec: TensorSpec, output: TensorSpec | None = None, **options: Any) -> nn.Module:
    """Build a checked `SimHead`; `options` are its keywords, `output` is not read."""
    head = SimHead(spec, **options)
    layout = head.layout
    positions: Sequence[Any] = [spec.shape[i] for i in layout.position_dims]
    if options.get("bare") is not None and layout.kind == "image":
        kernel: Any = head.map.kernel_size
        positions = list(map(pooled, positions, kernel))
    result = TensorSpec(
        (spec.shape[layout.batch_dim], spec.shape[layout.channel_dim], *positions), spec.dtype
    )
    check_shapes(head, (spec,), result, "the similarity head")
    return head


def similarity_matrix(v: Tensor) -> Tensor:
    """Return the matrix S(v) [B,B] of the cosine similarities between centred samples.

    Feature maps give each channel's standard deviation over its positions (flattened instead where there
    are fewer than four channels or one position); then subtract each sample's mean feature, L2-normalise,
    and take the Gram matrix, clamped to [-1,1]. A sample whose features are all equal has similarity 0 to
    all, and no gradient. S is invariant to v -> a v + b with a > 0 and b per sample.

    Args:
        v: [B,D] or [B,D,*positions].
    """
    if v.dim() > 2:
        maps = v.flatten(2)
        v = maps.std(2) if maps.shape[1] > 3 and maps.shape[2] > 1 else maps.flatten(1)
    centred = v - v.mean(1, keepdim=True)
    # The norm itself rather than norm + eps: the invariance is exact. Equal features, up to rounding, have no
    # direction: what a normalisation by eps would pass back of them is a million times any other gradient.
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    rounding = 4 * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v.detach(), dim=1, keepdim=True)
    alive = ~(norm <= rounding)  # so that nan stays nan, and the step is stopped
    unit = torch.where(alive, centred / torch.where(alive, norm, 1), 0)
    return (unit @ unit.t()).clamp(-1, 1)


def sim_loss(z: Tensor, y_onehot: Tensor) -> Tensor:
    """Return the mean square (shape []) of S(z) - S(Y) over all B^2 entries; no gradient reaches Y.

    Labels [B,*positions,C] make every labelled position a sample: an all-zero row is one to ignore. The
    matrix then has (B*positions)^2 entries.

    Args:
        z: [B,D] or [B,D,*positions].
        y_onehot: [B,C] or [B,*positions,C], batch first.
    """
    y = y_onehot.detach().to(z.dtype)
    if y.dim() == 2:
        return F.mse_loss(similarity_matrix(z), similarity_matrix(y))
    z, y = z.movedim(1, -1).flatten(0, -2), y.flatten(0, -2)
    labelled = (y != 0).any(1).to(z.dtype)
    error = (similarity_matrix(z) - similarity_matrix(y)).square()
    return (labelled @ error @ labelled) / labelled.sum().square().clamp_min(1)
