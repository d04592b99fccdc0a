"""Clean models of several shapes, each with an input and split points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locc.reproduce.networks import Block


@dataclass(frozen=True)
class Shape:
    """A model, its splits and a batch."""

    build: Callable[[], nn.Module]
    splits: tuple[str, ...]
    x: Callable[[], Any]
    y: Callable[[], Tensor]


def _labels(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 3, size)


def chain() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)], nn.Linear(6, 3))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.ReLU()) for _ in range(3)
        )
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x + first)


class Convolutional(nn.Module):
    """BatchNorm, in-place activations and in-place additions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._block(1)
        self.one, self.two = self._block(4), self._block(4)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    @staticmethod
    def _block(channels: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.clone())
        y = self.one(x.clone())
        y += x
        return self.head(self.two(y))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.block = Block(8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.rnn(self.embed(tokens))
        return self.head(self.block(x))


SHAPES = {
    "chain": Shape(chain, ("0", "1", "2"), lambda: torch.randn(5, 6), _labels(5)),
    "residual": Shape(Residual, ("blocks.*",), lambda: torch.randn(5, 6), _labels(5)),
    "convolutional": Shape(
        Convolutional, ("stem", "one", "two"), lambda: torch.randn(4, 1, 8, 8), _labels(4)
    ),
    "language": Shape(Language, ("embed", "block"), lambda: torch.randint(0, 7, (3, 5)), _labels(3, 5)),
}
