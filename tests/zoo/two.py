"""A two-layer model whose code between the layers is a test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc.capture import capture
from locc.ir.captured import Captured, Inputs, Root


class Two(nn.Module):
    def __init__(self, between: Callable[[nn.Module, Tensor], Any], leaf: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.leaf = leaf or nn.Identity()
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.between(self, x)


def sample(batch: int = 4) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(1))


def take(model: nn.Module, x: Any, *opened: str) -> Captured:
    return capture(Root(model), Inputs.of(model, x), frozenset(opened or ("model",)))


def targets(graph: fx.Graph) -> list[str]:
    return [n.target if isinstance(n.target, str) else n.target.__name__ for n in graph.nodes]
