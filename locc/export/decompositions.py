"""Operations that no exporter can write, in terms of ones that they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from locc.ir.grouped import by_expert


def decomposed(program: Any) -> Any:
    """Return an exported program without what no exporter can write; one that has nothing of it as it is."""
    table: dict[Any, Callable[..., Tensor]] = {}
    for node in program.graph.nodes:
        if str(node.target) == "transformers.grouped_mm_fallback.default":  # Hugging Face's experts
            table[node.target] = by_expert
    return program.run_decompositions(table) if table else program
