"""Small models of many shapes, described by values that can be printed, compared and built again.

A model is a *family* (how its parts are put together, and what its inputs look like) and a row of
*blocks* (what each part does inside). All of them are clean: whatever lies inside a block, no gradient
leaves it but through its output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from locc.errors import LoccError, nearest
from locc.testing.blocks import CONVOLUTIONS, INSIDE, RECURRENT, TOKENS, VECTORS, Maker

CLASSES, FEATURES, PIXELS, VOCABULARY, LENGTH = 3, 4, 6, 7, 3


class Residual(nn.Module):
    """Blocks whose addition lies in the outer forward, and a skip from the first value to the head."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, features] -> [B, classes]."""
        x = first = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self._head(x + first)

    def _head(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x)
        return result


class Accumulating(Residual):
    """The same, adding in place."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, features] -> [B, classes]."""
        x = self.stem(x)
        for block in self.blocks:
            total = x.clone()
            total += block(x)
            x = total
        return self._head(x)


class Branching(Residual):
    """Two paths from the stem that join, and a stem whose output every block reads."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, features] -> [B, classes]."""
        stem = self.stem(x)
        left = right = stem
        for number, block in enumerate(self.blocks):
            if number % 2:
                right = block(right + stem)
            else:
                left = block(left + stem)
        return self._head(left * torch.sigmoid(right))


class TwoInputs(nn.Module):
    """Two inputs, the second of which is read again before the head."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.blocks = nn.Sequential(*blocks)
        self.side = nn.Linear(FEATURES, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """[B, features] twice -> [B, classes]."""
        result: Tensor = self.head(self.blocks(self.stem(x)) + self.side(side))
        return result


class Recurrent(nn.Module):
    """Tokens through recurrent layers, the last state classified."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.stem = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, classes]."""
        x = self.stem(tokens)
        for block in self.blocks:
            x, _ = block(x)
        result: Tensor = self.head(x[:, -1])
        return result


class Language(nn.Module):
    """Tokens through causal transformer blocks, every position classified."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.stem = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, classes]."""
        result: Tensor = self.head(self.norm(self.blocks(self.stem(tokens) + self.position)))
        return result


class Tied(nn.Module):
    """A language model whose head shares the embedding's weight."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.stem = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, VOCABULARY)
        self.head.weight = self.stem.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, vocabulary]."""
        result: Tensor = self.head(self.blocks(self.stem(tokens)))
        return result


def _chain(blocks: Sequence[nn.Module], width: int) -> nn.Module:
    head = nn.Linear(width, CLASSES)
    return nn.Sequential(
        OrderedDict(stem=nn.Linear(FEATURES, width), blocks=nn.Sequential(*blocks), head=head)
    )


def _convolution(blocks: Sequence[nn.Module], width: int) -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
    stem = nn.Conv2d(1, width, 3, padding=1)
    return nn.Sequential(OrderedDict(stem=stem, blocks=nn.Sequential(*blocks), head=head))


def _rows(size: int, draw: torch.Generator) -> Tensor:
    return torch.randn(size, FEATURES, generator=draw)


def _tokens(size: int, draw: torch.Generator) -> Tensor:
    return torch.randint(VOCABULARY, (size, LENGTH), generator=draw)


@dataclass(frozen=True)
class Family:
    """How the models of a family are put together.

    Attributes:
        blocks: the kinds of blocks that it takes, by name.
        assemble: (blocks, width) -> the model.
        inputs: (batch size, generator) -> a batch of inputs as `program.step` takes it.
        after: submodules behind the blocks after which it may be cut.
        positions: shape of what is classified, behind the batch dimension.
        classes: number of classes.
    """

    blocks: dict[str, Maker]
    assemble: Callable[[Sequence[nn.Module], int], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    after: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    classes: int = CLASSES


FAMILIES = {
    "chain": Family(VECTORS, _chain, _rows),
    "residual": Family(VECTORS, Residual, _rows),
    "accumulating": Family(VECTORS, Accumulating, _rows),
    "branching": Family(VECTORS, Branching, _rows),
    "convolution": Family(
        CONVOLUTIONS, _convolution, lambda n, g: torch.randn(n, 1, PIXELS, PIXELS, generator=g)
    ),
    "two_inputs": Family(VECTORS, TwoInputs, lambda n, g: (_rows(n, g), _rows(n, g)), ("side",)),
    "named_inputs": Family(
        VECTORS, TwoInputs, lambda n, g: {"x": _rows(n, g), "side": _rows(n, g)}, ("side",)
    ),
    "recurrent": Family(RECURRENT, Recurrent, _tokens),
    "attention": Family(TOKENS, Language, _tokens, positions=(LENGTH,)),
    "tied": Family(TOKENS, Tied, _tokens, positions=(LENGTH,), classes=VOCABULARY),
}


def family_of(name: str) -> Family:
    """Return the family of that name.

    Raises:
        LoccError: there is none.
    """
    if name not in FAMILIES:
        raise LoccError(f"there is no family '{name}'; {nearest(name, FAMILIES)}")
    return FAMILIES[name]


@dataclass(frozen=True)
class ModelSpec:
    """A small random model; its `repr` is Python that builds it again.

    Attributes:
        family: a key of `FAMILIES`.
        blocks: the kinds of its blocks, in forward order; the keys of `FAMILIES[family].blocks`.
        width: number of features (channels) between the blocks.
        loss: "cross_entropy", or "mse" on numbers of the output's shape.
        seed: of the weights and the batches.
        dtype: of the weights and of what is real in the batches; a float64 model holds float32 numbers.
    """

    family: str = "chain"
    blocks: tuple[str, ...] = ("tanh",)
    width: int = 4
    loss: str = "cross_entropy"
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        known = family_of(self.family).blocks
        for kind in self.blocks:
            if kind not in known:
                raise LoccError(f"family '{self.family}' has no block '{kind}'; {nearest(kind, known)}")
        if self.loss not in ("cross_entropy", "mse"):
            raise LoccError(f"loss={self.loss!r}: give 'cross_entropy' or 'mse'")

    def build(self) -> nn.Module:
        """Return a new model with the weights of the seed; the user's random state stays as it was."""
        family = FAMILIES[self.family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            constant = (torch.rand(self.width) + 0.5).to(self.dtype)  # blocks share the tensor: no cast later
            blocks = [family.blocks[kind](self.width, constant) for kind in self.blocks]
            return family.assemble(blocks, self.width).to(self.dtype)

    @property
    def splits(self) -> tuple[str, ...]:
        """Every submodule after which the model may be cut, in forward order; any subset is valid."""
        blocks = [
            f"blocks.{i}{inside}"
            for i, kind in enumerate(self.blocks)
            for inside in (*(f".{name}" for name in INSIDE.get(kind, ())), "")
        ]
        return ("stem", *blocks, *FAMILIES[self.family].after)

    def batch(self, size: int = 2, number: int = 0) -> tuple[Any, Tensor]:
        """Return inputs as `program.step` takes them, and their target.

        Args:
            size: number of samples B.
            number: which batch; the same number is the same batch.

        Returns:
            x, and y: class indices [B] or [B, T], or for "mse" numbers [B, classes] or [B, T, classes].
        """
        family = FAMILIES[self.family]
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        x = tree_map(self._cast, family.inputs(size, draw))
        shape = (size, *family.positions)
        if self.loss == "mse":
            return x, self._cast(torch.randn(*shape, family.classes, generator=draw))
        return x, torch.randint(family.classes, shape, generator=draw)

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value
