"""Small models for the examples and the command line: `examples/models.py:small_cnn`.

Plain PyTorch: nothing here knows of locc.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three convolutional stages and a linear head, for 8x8 images of one channel."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.layer1 = stage(1, width)  # [B, width, 8, 8]
        self.layer2 = stage(width, 2 * width, stride=2)  # [B, 2 * width, 4, 4]
        self.layer3 = stage(2 * width, 4 * width, stride=2)  # [B, 4 * width, 2, 2]
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * 2 * 2, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 1, 8, 8] to logits [B, classes]."""
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.head(x)


class SmallMLP(nn.Module):
    """Four hidden layers over the 64 pixels."""

    def __init__(self, width: int = 128, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        widths = [64, *[width] * depth]
        self.flatten = nn.Flatten()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 1, 8, 8] to logits [B, classes]."""
        x = self.flatten(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    """Two convolutions with a skip around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(stage(width, width), nn.Conv2d(width, width, 3, padding=1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width, H, W] to the same shape."""
        return self.relu(x + self.body(x))


class SmallResNet(nn.Module):
    """A stem, four residual blocks, and a pooled head."""

    def __init__(self, width: int = 32, blocks: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = stage(1, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 1, 8, 8] to logits [B, classes]."""
        return self.head(self.blocks(self.stem(x)))


def stage(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def small_cnn() -> SmallCNN:
    """Splits: layer1, layer2, layer3."""
    return SmallCNN()


def small_mlp() -> SmallMLP:
    """Splits: blocks.0, blocks.1, blocks.2, or `blocks.*`."""
    return SmallMLP()


def small_resnet() -> SmallResNet:
    """Splits: stem, blocks.0, blocks.1, blocks.2, or `blocks.*`."""
    return SmallResNet()
