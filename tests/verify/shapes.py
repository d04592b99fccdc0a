"""Clean models of several shapes, each with an input and split points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
        self.block = Block(8)
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


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *[nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)],
            *[
                nn.Conv2d(width, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ],
            *[nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)],
        )
        self.shortcut = nn.Sequential()
        if inside != out or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return self.relu(y)


class ResNet50(nn.Module):
    """ResNet-50's depth at a chosen width (64 in the original): 16 bottleneck blocks and a head."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        inside, blocks = width, []
        for stage, count in enumerate((3, 4, 6, 3)):
            for i in range(count):
                blocks.append(Bottleneck(inside, width * 2**stage, 2 if stage and i == 0 else 1))
                inside = 4 * width * 2**stage
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model of `layers` blocks."""

    def __init__(self, layers: int = 24, width: int = 16, vocabulary: int = 50, length: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
