"""The product of sorted rows with a stack of matrices: what a mixture of experts multiplies with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply rows offs[e-1] to offs[e] of `x`, [S,K], with `weight[e]`, [E,K,N]: `torch._grouped_mm`.

    PyTorch knows its shapes in bfloat16 alone. On tensors that are only shapes, and where code is compiled
    or exported, this is written in other products.
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        y = by_expert(x, weight, offs)
        y = y if bias is None else y + bias
        return y if out_dtype is None else y.to(out_dtype)
    return torch._grouped_mm(x, weight, offs=offs, bias=bias, out_dtype=out_dtype)


def by_expert(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Return `grouped_mm`, with zeros for rows beyond the last group.

    Each expert sees every row, so this costs E times as much: no exporter has a product of uneven groups.
    """
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    expert = (row >= offs[None, :]).sum(1, keepdim=True)
    parts = [torch.where(expert == e, x @ weight[e], 0.0) for e in range(weight.shape[0])]
    return torch.stack(parts).sum(0)
