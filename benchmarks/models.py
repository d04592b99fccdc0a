"""Three chains of twelve blocks, each a `stem`, `blocks` and a `head`, and the local heads for them.

The sizes make one block cost some milliseconds on two cores: enough that the arithmetic shows and not
the bookkeeping, little enough that a round of all contestants takes seconds.

A local module needs no gradient with respect to its input. Where a block is one matrix product or one
convolution (`mlp`, `resnet`), that is a third of the arithmetic, and K = 12 saves time; where it is two
(`resnet-basic`) or six (`gpt`), it is a small share, and local heads on every position of a sequence cost
more than it saves: those of `gpt` at its best read a quarter of the positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = 12
CLASSES = 10


class Chain(nn.Module):
    """`stem`, then `blocks` in order, then `head`."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch to logits."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class MLPBlock(nn.Module):
    """Linear, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width] to [B, width]."""
        return F.relu(self.linear(x))


class ResidualBlock(nn.Module):
    """One 3x3 convolution with BatchNorm and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width, H, W] to the same shape."""
        return F.relu(x + self.norm(self.conv(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a skip; a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, with BatchNorm and a skip: the block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, 4 * width, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.skip(x))


class Attention(nn.Module):
    """Causal self-attention of normed values.

    With `folded` the norm's scale and shift are applied to the weights that read it, and not to its values:
    the same function of the same parameters. Where the input needs no gradient, the norm then needs none
    either, which spares the product that would make it.
    """

    folded = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to [B, T, width]."""
        if self.folded:
            scaled = self.qkv.weight * self.norm.weight
            shift = F.linear(self.norm.bias, self.qkv.weight, self.qkv.bias)
            made = F.linear(F.layer_norm(x, x.shape[-1:], eps=self.norm.eps), scaled, shift)
        else:
            made = self.qkv(self.norm(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in made.chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return y


class GPTBlock(nn.Module):
    """Pre-norm causal self-attention and a four times wider MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to [B, T, width]."""
        x = x + self.attention(x)
        return x + self.mlp(x)


class Embedding(nn.Module):
    """Token plus position."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, T] token ids to [B, T, width]."""
        return self.token(tokens) + self.position


def linear_head(width: int, classes: int = CLASSES) -> nn.Module:
    """Map [B, width] to logits."""
    return nn.Linear(width, classes)


def pooled_head(width: int, classes: int = CLASSES) -> nn.Module:
    """Average over the image, then map to logits."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def vocabulary_head(width: int, vocabulary: int) -> nn.Module:
    """Map [B, T, width] to next-token logits."""
    return nn.Linear(width, vocabulary)


def mlp(width: int = 1024) -> Chain:
    """Twelve linear layers of one width."""
    return Chain(nn.Identity(), [MLPBlock(width) for _ in range(BLOCKS)], linear_head(width))


def resnet(width: int = 128) -> Chain:
    """Twelve single-convolution residual blocks at half the image's resolution."""
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
    return Chain(stem, [ResidualBlock(width) for _ in range(BLOCKS)], pooled_head(width))


def resnet_basic(width: int = 32) -> Chain:
    """Three stages of four basic blocks; resolution halves and width doubles between stages."""
    widths = [width] * 4 + [2 * width] * 4 + [4 * width] * 4
    blocks = [
        BasicBlock(before, after, stride=after // before)
        for before, after in zip([width, *widths], widths, strict=False)
    ]
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return Chain(stem, blocks, pooled_head(4 * width))


def resnet50(width: int = 64, classes: int = 1000) -> Chain:
    """ResNet-50 by He et al. 2016, and narrower ones: 3, 4, 6 and 3 bottlenecks; strides in the 3x3 ones."""
    stem = nn.Sequential(
        *(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
    )
    blocks, inputs = [], width
    for stage, depth in enumerate((3, 4, 6, 3)):
        for i in range(depth):
            blocks.append(Bottleneck(inputs, width << stage, 2 if stage and i == 0 else 1))
            inputs = 4 * width << stage
    return Chain(stem, blocks, pooled_head(inputs, classes))


def gpt(width: int = 256, vocabulary: int = 384, length: int = 64, heads: int = 4) -> Chain:
    """Twelve pre-norm decoder blocks with an untied vocabulary head."""
    blocks = [GPTBlock(width, heads) for _ in range(BLOCKS)]
    return Chain(Embedding(vocabulary, length, width), blocks, vocabulary_head(width, vocabulary))


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy over a batch of sequences, or of single labels."""
    return F.cross_entropy(logits.flatten(0, -2), tokens.flatten())


@dataclass(frozen=True)
class Workload:
    """A model, a batch for it, its loss, and the local head for a boundary of a given width."""

    name: str
    model: Callable[[], Chain]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    head: Callable[[int], nn.Module]
    feature_axis: int
    """The axis of a boundary that holds its width."""
    heads: Mapping[str, Any] | None = None
    """Options of `dgl` by which it costs less than with these heads."""
    recompute: str | bool = False
    """Where `locc` computes activations again to need little memory."""


WORKLOADS = {
    "mlp": Workload(
        "mlp",
        mlp,
        lambda: (torch.randn(480, 1024), torch.randint(0, CLASSES, (480,))),
        F.cross_entropy,
        linear_head,
        feature_axis=-1,
    ),
    "resnet": Workload(
        "resnet",
        resnet,
        lambda: (torch.randn(64, 3, 32, 32), torch.randint(0, CLASSES, (64,))),
        F.cross_entropy,
        pooled_head,
        feature_axis=1,
    ),
    "gpt": Workload(
        "gpt",
        gpt,
        lambda: (torch.randint(0, 384, (8, 64)), torch.randint(0, 384, (8, 64))),
        token_loss,
        lambda width: vocabulary_head(width, 384),
        feature_axis=-1,
        heads={"head": "sr"},
        recompute="blocks.*.attention",
    ),
    "resnet-basic": Workload(
        "resnet-basic",
        resnet_basic,
        lambda: (torch.randn(64, 3, 32, 32), torch.randint(0, CLASSES, (64,))),
        F.cross_entropy,
        pooled_head,
        feature_axis=1,
    ),
    "mlp-small": Workload(
        "mlp-small",
        lambda: mlp(512),
        lambda: (torch.randn(64, 512), torch.randint(0, CLASSES, (64,))),
        F.cross_entropy,
        linear_head,
        feature_axis=-1,
    ),
}
"""`mlp-small` has modules of about a millisecond at K = 12: there the cost beyond arithmetic shows."""

DEFAULT = ("mlp", "resnet", "gpt")
"""What `make bench` runs unless told; most of its time is what compiling them takes."""


def splits(modules: int, blocks: int = BLOCKS) -> list[str]:
    """Return the split points that cut a chain into `modules` runs of as equally many blocks as can be."""
    return [f"blocks.{blocks * k // modules - 1}" for k in range(1, modules)]


def segments(model: Chain, modules: int) -> list[nn.Sequential]:
    """Cut a chain where `splits` does, without locc: the stem goes first, the head last."""
    bounds = [len(model.blocks) * k // modules for k in range(modules + 1)]
    runs = [list(model.blocks)[start:end] for start, end in pairwise(bounds)]
    runs[0].insert(0, model.stem)
    runs[-1].append(model.head)
    return [nn.Sequential(*run) for run in runs]
