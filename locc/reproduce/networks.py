"""The networks of published results; plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

Init = Callable[[nn.Linear], None]


def he(layer: nn.Linear) -> None:
    """Start He-normal."""
    nn.init.kaiming_normal_(layer.weight)


def orthogonal(layer: nn.Linear) -> None:
    """Start with unit singular values and no bias."""
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)


def xavier(layer: nn.Linear) -> None:
    """Start Xavier-normal without bias."""
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)


def small(layer: nn.Linear) -> None:
    """Start at 0.01 N(0, 1), with biases of 0.1."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, 0.1)


def mlp(
    *widths: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: bool = False,
    dropout: float = 0.0,
    bias: bool = True,
    init: Init | None = None,
) -> nn.Sequential:
    """Return hidden blocks 0, 1, ... of linear, BatchNorm, activation, dropout, and an output layer."""
    *hidden, classes = widths
    blocks: list[nn.Module] = []
    for a, b in pairwise(hidden):
        parts = [nn.Linear(a, b, bias=bias), *([nn.BatchNorm1d(b)] if norm else []), activation()]
        blocks.append(nn.Sequential(*parts, *([nn.Dropout(dropout)] if dropout else [])))
    network = nn.Sequential(*blocks, nn.Linear(hidden[-1], classes))
    if init is not None:
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                init(layer)
    return network


def associated_mlp() -> nn.Sequential:
    """Return 784-1024-1024-(5120-1024)-1024-10: two encoders, the top bridge, two decoders."""
    network = nn.Sequential(
        nn.Sequential(nn.Linear(784, 1024), nn.ELU()),
        nn.Sequential(nn.Linear(1024, 1024), nn.ELU()),
        nn.Sequential(nn.Linear(1024, 5120), nn.Sigmoid(), nn.Linear(5120, 1024), nn.Sigmoid()),
        nn.Sequential(nn.Linear(1024, 1024), nn.Sigmoid()),
        nn.Linear(1024, 10),
    )
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            he(layer)
    return network


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def three_convolutions() -> nn.Sequential:
    """Return three 5x5 convolutions of 128 channels, each with 3x3 pooling, for 32x32 images."""
    return nn.Sequential(
        nn.Sequential(_conv(3, 128, 5), nn.MaxPool2d(3)),
        nn.Sequential(_conv(128, 128, 5), nn.AvgPool2d(3)),
        nn.Sequential(_conv(128, 128, 5), nn.AvgPool2d(3)),
        nn.Sequential(nn.Flatten(), nn.Linear(128, 10)),
    )


def vgg8b(dropout: float = 0.05) -> nn.Sequential:
    """Return six convolutions and a hidden layer of 1024, for 32x32 images; blocks 0 to 6 and the output."""
    blocks: list[nn.Module] = []
    shapes = [(3, 128, 0), (128, 256, 1), (256, 256, 0), (256, 512, 1), (512, 512, 1), (512, 512, 1)]
    for inputs, outputs, pooled in shapes:
        block = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))
        block.append(nn.LeakyReLU(0.01))
        if pooled:
            block.append(nn.MaxPool2d(2))
        blocks.append(block.append(nn.Dropout2d(dropout)))
    hidden = [
        nn.Flatten(),
        nn.Linear(2048, 1024),
        nn.BatchNorm1d(1024),
        nn.LeakyReLU(0.01),
        nn.Dropout(dropout),
    ]
    return nn.Sequential(*blocks, nn.Sequential(*hidden), nn.Linear(1024, 10))


class BasicBlock(nn.Module):
    """Two convolutions with a skip around them; a skip to more channels subsamples and pads with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, stride=stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        skip = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            skip = functional.pad(skip, (0, 0, 0, 0, 0, self.more))
        y: Tensor = self.second(self.first(x)) + skip
        return y.relu()


def resnet(depth: int = 32) -> nn.Sequential:
    """Return a residual network for 32x32 images: stem, (depth - 2) / 2 blocks, the head."""
    count = (depth - 2) // 6
    blocks: list[nn.Module] = [_conv(3, 16)]
    for stage, (inputs, outputs) in enumerate(pairwise((16, 16, 32, 64))):
        blocks += [
            BasicBlock(outputs if i else inputs, outputs, 2 if stage and not i else 1) for i in range(count)
        ]
    return nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))


def associated_cnn() -> nn.Sequential:
    """Return four pairs of 3x3 convolutions (32, 32, 64, 64 channels) as encoders, and four decoders."""
    pairs: list[nn.Module] = []
    for k, (inputs, outputs) in enumerate(pairwise((3, 32, 32, 64, 64))):
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ELU()]
        layers += [nn.Conv2d(outputs, outputs, 3, 2 if k % 2 else 1, padding=1), nn.ELU()]
        pairs.append(nn.Sequential(*layers))
    bridge = [nn.Flatten(), nn.Linear(64 * 8 * 8, 1280), nn.Sigmoid(), nn.Linear(1280, 256), nn.Sigmoid()]
    decoders = [nn.Sequential(nn.Linear(256, 256), nn.Sigmoid()) for _ in range(3)]
    return nn.Sequential(*pairs, nn.Sequential(*bridge), *decoders, nn.Linear(256, 10))


class Block(nn.Module):
    """A transformer block: causal attention and an MLP, each behind a LayerNorm, with a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to the same shape."""
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, 2)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class GPT(nn.Module):
    """A language model of characters: embeddings, blocks, and a head."""

    def __init__(self, vocabulary: int = 65, context: int = 64, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map characters [B, T] to logits [B, T, vocabulary]."""
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y
