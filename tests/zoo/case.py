"""The form of a case: a tiny model with inputs, a target, a loss, and places to cut it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import locc

BATCH = 4


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    `inputs()` gives x as a user passes it to `program.step(x, y)`, at a batch of 4; `target(batch)` gives y.
    `splits` lists ways to cut the model, each a list of submodule names; the last split name ends a module
    that is followed by at least one more. `origins` names the mechanism that captures each of `splits`
    (None where a test need not care).
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    target: Callable[[int], Any]
    loss: str | Callable[[Any, Any], Tensor]
    splits: tuple[tuple[str, ...], ...]
    tags: frozenset[str] = frozenset()
    origins: tuple[str | None, ...] = ()

    def __str__(self) -> str:
        return self.name

    def compile(self, cut: int = 0) -> locc.Program:
        """Compile the case for backpropagation, unproved, at one of its ways to cut."""
        x, splits = self.inputs(), self.splits[cut]
        return locc.compile(
            self.build(), "bp", splits, loss=self.loss, example_inputs=x, tied="owner", verify=False
        )

    def opened(self, splits: tuple[str, ...]) -> frozenset[str]:
        """Return the paths under a Root that `splits` need to be open: their strict ancestors."""
        found = {"model"} if splits else set()
        for name in splits:
            atoms = ["model", *name.split(".")]
            found |= {".".join(atoms[:i]) for i in range(1, len(atoms))}
        return frozenset(found)


def seeded(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Build a model from a fixed seed, without touching the caller's generator."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return factory()

    return build


def normal(*shape: int, seed: int = 1) -> Callable[[], Tensor]:
    """Return a factory of normal inputs of one sample's shape."""
    return lambda: torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int, vocabulary: int, seed: int = 2) -> Callable[[], Tensor]:
    """Return a factory of token ids."""
    return lambda: torch.randint(vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def classes(count: int, *shape: int) -> Callable[[int], Tensor]:
    """Return a factory of class targets."""
    return lambda batch: torch.randint(count, (batch, *shape), generator=torch.Generator().manual_seed(3))


def case(
    name: str,
    factory: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    target: Callable[[int], Any],
    splits: list[list[str]],
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    tags: str = "",
    origins: tuple[str | None, ...] = (),
) -> Case:
    """Write a case down in one call."""
    cuts = tuple(tuple(s) for s in splits)
    return Case(name, seeded(factory), inputs, target, loss, cuts, frozenset(tags.split()), origins)


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of [B, T, V] logits."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
