"""The project's model; the factory also gives example inputs, so that a command line needs no shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A residual network for the 8 x 8 digits of scikit-learn."""

    def __init__(self, width: int = 32, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, 1, 8, 8] images to [B, classes] scores."""
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def build() -> tuple[nn.Module, Tensor]:
    """Return the model and example inputs."""
    return Network(), torch.randn(4, 1, 8, 8)
