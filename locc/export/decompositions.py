"""Operations that no exporter can write, in terms of ones that they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Multiply rows offs[e-1] to offs[e] of `x`, [S,K], with `weight[e]`, [E,K,N]; rows beyond get zeros.

    Each expert sees every row, so this costs E times as much: ONNX has no product of uneven groups.
    """
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    expert = (row >= offs[None, :]).sum(1, keepdim=True)
    parts = [torch.where(expert == e, x @ weight[e], 0.0) for e in range(weight.shape[0])]
    return torch.stack(parts).sum(0)


def decomposed(program: Any) -> Any:
    """Return an exported program without what no exporter can write; one that has nothing of it as it is."""
    table: dict[Any, Callable[..., Tensor]] = {}
    for node in program.graph.nodes:
        if str(node.target) == "transformers.grouped_mm_fallback.default":  # Hugging Face's experts
            table[node.target] = grouped_mm
    return program.run_decompositions(table) if table else program
