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
from torch.nn import functional
from torch.utils._pytree import tree_map

from locc.errors import LoccError, nearest
from locc.testing.blocks import CONVOLUTIONS, FEW, INSIDE, RECURRENT, TOKENS, VECTORS, Maker

CLASSES, FEATURES, PIXELS, VOCABULARY, LENGTH, LONGEST = 3, 4, 6, 7, 3, 8


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
        self.position = nn.Parameter(torch.zeros(LONGEST, width))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, classes]."""
        x = self.stem(tokens) + self.position[: tokens.shape[1]]
        result: Tensor = self.head(self.norm(self.blocks(x)))
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


class Auxiliary(nn.Module):
    """A second classifier on the way to the first."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.side = nn.Linear(width, CLASSES)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Any:
        """[B, features] -> the outputs of both, [B, classes] each."""
        x = self.stem(x)
        aux = self.side(x)
        return {"out": self.head(self.blocks(x)), "aux": aux}


class Tasks(Auxiliary):
    """Two classifiers at the end, and a skip to the second."""

    def forward(self, x: Tensor) -> Any:
        """[B, features] -> the outputs of both, [B, classes] each."""
        first = self.stem(x)
        x = self.blocks(first)
        return self.head(x), self.side(x + first)


def _every_output(name: str) -> Callable[[Any, Tensor], Tensor]:
    """Return a loss of the first output and, with less weight, of each other one."""
    one = functional.mse_loss if name == "mse" else functional.cross_entropy

    def every_output(output: Any, target: Tensor) -> Tensor:
        first, *others = output.values() if isinstance(output, dict) else output
        if name == "mse" and first.shape != target.shape:
            raise ValueError("mse: a target of another shape than the output")
        loss = one(first, target)
        for other in others:
            loss = loss + 0.3 * one(other, target)
        return loss

    return every_output


def _chain(blocks: Sequence[nn.Module], width: int) -> nn.Module:
    head = nn.Linear(width, CLASSES)
    return nn.Sequential(
        OrderedDict(stem=nn.Linear(FEATURES, width), blocks=nn.Sequential(*blocks), head=head)
    )


def _convolution(blocks: Sequence[nn.Module], width: int) -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
    stem = nn.Conv2d(1, width, 3, padding=1)
    return nn.Sequential(OrderedDict(stem=stem, blocks=nn.Sequential(*blocks), head=head))


def _rows(size: int, draw: torch.Generator, _: int) -> Tensor:
    return torch.randn(size, FEATURES, generator=draw)


def _tokens(size: int, draw: torch.Generator, more: int) -> Tensor:
    return torch.randint(VOCABULARY, (size, LENGTH + more), generator=draw)


def _images(size: int, draw: torch.Generator, more: int) -> Tensor:
    return torch.randn(size, 1, PIXELS + more, PIXELS + more, generator=draw)


@dataclass(frozen=True)
class Family:
    """How the models of a family are put together.

    Attributes:
        blocks: the kinds of blocks that it takes, by name.
        assemble: (blocks, width) -> the model.
        inputs: (batch size, generator, by how much longer) -> a batch of inputs as `program.step` takes it.
        after: submodules behind the blocks after which it may be cut.
        grows: whether the inputs may be longer (larger) than the smallest, and the target with them.
        positions: shape of what is classified in the smallest ones, behind the batch dimension.
        classes: number of classes.
        outputs: whether it has several, and the loss reads them all.
    """

    blocks: dict[str, Maker]
    assemble: Callable[[Sequence[nn.Module], int], nn.Module]
    inputs: Callable[[int, torch.Generator, int], Any]
    after: tuple[str, ...] = ()
    grows: bool = False
    positions: tuple[int, ...] = ()
    classes: int = CLASSES
    outputs: bool = False


FAMILIES = {
    "chain": Family(VECTORS, _chain, _rows),
    "residual": Family(VECTORS, Residual, _rows),
    "accumulating": Family(VECTORS, Accumulating, _rows),
    "branching": Family(VECTORS, Branching, _rows),
    "convolution": Family(CONVOLUTIONS, _convolution, _images, grows=True),
    "two_inputs": Family(VECTORS, TwoInputs, lambda *a: (_rows(*a), _rows(*a)), ("side",)),
    "named_inputs": Family(VECTORS, TwoInputs, lambda *a: {"x": _rows(*a), "side": _rows(*a)}, ("side",)),
    "recurrent": Family(RECURRENT, Recurrent, _tokens, grows=True),
    "attention": Family(TOKENS, Language, _tokens, grows=True, positions=(LENGTH,)),
    "tied": Family(TOKENS, Tied, _tokens, grows=True, positions=(LENGTH,), classes=VOCABULARY),
    "auxiliary": Family(FEW, Auxiliary, _rows, outputs=True),
    "tasks": Family(FEW, Tasks, _rows, outputs=True),
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
        loss: "cross_entropy", or "mse" on numbers of the output's shape; of a family of several outputs,
            the sum over these.
        seed: of the weights and the batches.
        dtype: of the weights and of what is real in the batches; a float64 model holds float32 numbers.
        frozen: submodules and parameters that do not train.
        shared: whether blocks of one kind share their parameters.
    """

    family: str = "chain"
    blocks: tuple[str, ...] = ("tanh",)
    width: int = 4
    loss: str = "cross_entropy"
    seed: int = 0
    dtype: torch.dtype = torch.float32
    frozen: tuple[str, ...] = ()
    shared: bool = False

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
            model = family.assemble(blocks, self.width).to(self.dtype)
        if self.shared:
            for block, kind in zip(blocks, self.blocks, strict=True):
                _share(block, blocks[self.blocks.index(kind)])
        for name in self.frozen:
            held = [p for path, p in model.named_parameters(remove_duplicate=False) if _under(path, name)]
            if not held:
                raise LoccError(f"frozen={self.frozen!r}: the model has no parameter under '{name}'")
            for parameter in held:
                parameter.requires_grad_(False)
        return model

    @property
    def criterion(self) -> str | Callable[[Any, Tensor], Tensor]:
        """The loss, as `locc.compile` takes it."""
        return _every_output(self.loss) if FAMILIES[self.family].outputs else self.loss

    @property
    def freezable(self) -> tuple[str, ...]:
        """What may be frozen; of any two of them, something is left to train."""
        head = () if self.family == "tied" else ("head",)
        return ("stem", "stem.weight", *(f"blocks.{i}" for i in range(len(self.blocks))), *head)

    @property
    def parts(self) -> int:
        """The number of parts, in a row, that hold something to train."""
        held = {name.removesuffix(".weight") for name in self.frozen}  # an embedding has no bias
        if self.shared:
            kinds = {kind for i, kind in enumerate(self.blocks) if f"blocks.{i}" in held}
            held |= {f"blocks.{i}" for i, kind in enumerate(self.blocks) if kind in kinds}
        return len(set(self.freezable) - held - {"stem.weight"})

    @property
    def splits(self) -> tuple[str, ...]:
        """Every submodule after which the model may be cut, in forward order; any subset is valid."""
        blocks = [
            f"blocks.{i}{inside}"
            for i, kind in enumerate(self.blocks)
            for inside in (*(f".{name}" for name in INSIDE.get(kind, ())), "")
        ]
        return ("stem", *blocks, *FAMILIES[self.family].after)

    def batch(self, size: int = 2, number: int = 0, more: int = 0) -> tuple[Any, Tensor]:
        """Return inputs as `program.step` takes them, and their target.

        Args:
            size: number of samples B.
            number: which batch; the same number is the same batch.
            more: by how much sequences are longer (images larger) than the smallest; up to 5.

        Returns:
            x, and y: class indices [B] or [B, T], or for "mse" numbers [B, classes] or [B, T, classes].
        """
        family = FAMILIES[self.family]
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        x = tree_map(self._cast, family.inputs(size, draw, more))
        shape = (size, *(n + more for n in family.positions))
        if self.loss == "mse":
            return x, self._cast(torch.randn(*shape, family.classes, generator=draw))
        return x, torch.randint(family.classes, shape, generator=draw)

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


def _share(one: nn.Module, other: nn.Module) -> None:
    """Give a module the parameters of another one that is built alike."""
    for part, twin in zip(one.modules(), other.modules(), strict=True):
        for name, parameter in twin.named_parameters(recurse=False):
            setattr(part, name, parameter)


def _under(path: str, name: str) -> bool:
    return f"{path}.".startswith(f"{name}.")
