"""Where a fit stands, so that one that was cut goes on at the same batch and ends with the same bits."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locc.ir import Phase

PLACES = ("generator", "sampler.generator", "batch_sampler.generator", "batch_sampler.sampler.generator")
"""Where a loader may hold generators of its own."""


@dataclass(frozen=True)
class Pass:
    """One pass over the data that a fit makes.

    `at` is (stage, epoch, turn), in the order in which the passes come; warm-ups are epoch 0. `ends` is
    the warm-up phase of which this is the last pass.
    """

    at: tuple[int, int, int]
    phase: Phase | None
    ends: str | None = None

    @property
    def steps(self) -> int | None:
        """How many steps it has, where it reads no data."""
        return self.phase.steps if self.phase else None

    @property
    def made(self) -> Tensor | None:
        """The target of such steps."""
        return self.phase.made if self.phase else None


def passes(phases: tuple[Phase, ...], epochs: int, warm: set[str]) -> list[Pass]:
    """Return the passes of a fit in order; the warm-up phases in `warm` are over."""
    found = []
    stages = sorted({p.stage for p in phases}) or [0]
    for stage in stages:
        own = [p for p in phases if p.stage == stage]
        turn = 0
        for phase in (p for p in own if p.warmup):
            for left in reversed(range(phase.epochs)):
                if phase.name not in warm:
                    found.append(Pass((stage, 0, turn), phase, None if left else phase.name))
                turn += 1
        turns: list[Phase | None] = [p for p in own if not p.warmup for _ in range(p.epochs)]
        if not turns and len(stages) == 1:
            turns = [None]
        found += [Pass((stage, e, i), p) for e in range(1, epochs + 1) for i, p in enumerate(turns)]
    return found


@dataclass(frozen=True)
class RandomState:
    """What a loader may draw from: the generators of PyTorch, Python and NumPy (if loaded), and its own."""

    tensors: dict[str, Tensor]
    python: Any
    numpy: Any = None

    @classmethod
    def now(cls, loader: Any, device: torch.device) -> RandomState:
        """Take the state as it is."""
        tensors = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(device)
        for place, generator in _generators(loader).items():
            tensors[place] = generator.get_state()
        numpy = sys.modules.get("numpy")
        return cls(tensors, random.getstate(), numpy and numpy.random.get_state())

    def restore(self, loader: Any, device: torch.device) -> None:
        """Bring it back."""
        torch.set_rng_state(self.tensors["cpu"])
        if device.type == "cuda" and "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"], device)
        for place, generator in _generators(loader).items():
            if place in self.tensors:
                generator.set_state(self.tensors[place])
        random.setstate(self.python)
        if self.numpy is not None and "numpy" in sys.modules:
            sys.modules["numpy"].random.set_state(self.numpy)

    def plain(self) -> dict[str, Any]:
        """Return what is no tensor, as JSON keeps it."""
        version, numbers, spare = self.python
        found: dict[str, Any] = {"python": [version, list(numbers), spare], "numpy": None}
        if self.numpy is not None:
            kind, keys, *rest = self.numpy
            found["numpy"] = [kind, [int(k) for k in keys], *rest]
        return found

    @classmethod
    def of(cls, tensors: dict[str, Tensor], plain: Mapping[str, Any]) -> RandomState:
        """Return the state whose parts `tensors` and `plain` are."""
        version, numbers, spare = plain["python"]
        numpy = None if plain["numpy"] is None else tuple(plain["numpy"])
        return cls(tensors, (version, tuple(numbers), spare), numpy)


def _generators(loader: Any) -> dict[str, torch.Generator]:
    found = {}
    for place in PLACES:
        held = loader
        for name in place.split("."):
            held = getattr(held, name, None)
        if isinstance(held, torch.Generator):
            found[place] = held
    return found


@dataclass
class Rest:
    """What an iterator has left, `back` first; iterating over this never starts it anew."""

    batches: Iterator[Any]
    back: list[Any] = field(default_factory=list)

    def __iter__(self) -> Rest:
        return self

    def __next__(self) -> Any:
        return self.back.pop() if self.back else next(self.batches)


@dataclass
class Progress:
    """A fit under way.

    Attributes:
        epochs: how many it has in all.
        random: the random state at the start of the pass under way.
        outside: the program's phase when the fit began.
        at: the pass under way, as `Pass.at`; where there is no such pass, the next one.
        batches: how many batches of it are done.
        sums: of the loss and the objectives over these batches, by name.
        source: what is left of the loader in this pass, where it may yield it only once.
        callbacks: returns what the callbacks keep, by the names of their classes, as JSON.
    """

    epochs: int
    random: RandomState
    outside: str | None = None
    at: tuple[int, int, int] = (0, 0, 0)
    batches: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    source: Rest | None = None
    callbacks: Callable[[], list[list[Any]]] = list

    def count(self, found: Mapping[str, Tensor]) -> None:
        """Add a batch that is done."""
        for name, value in found.items():
            self.sums[name] = self.sums[name] + value.float() if name in self.sums else value.float()
        self.batches += 1

    def turn(self, random: RandomState) -> None:
        """Go on to the next pass."""
        stage, epoch, turn = self.at
        self.at = (stage, epoch, turn + 1)
        self.batches, self.sums, self.random, self.source = 0, {}, random, None

    def packed(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return this as JSON and tensors, for a checkpoint."""
        header = {
            "epochs": self.epochs,
            "outside": self.outside,
            "at": list(self.at),
            "batches": self.batches,
            "sums": list(self.sums),
            "random": self.random.plain(),
            "callbacks": self.callbacks(),
        }
        tensors = {f"sum/{i}": value for i, value in enumerate(self.sums.values())}
        return header, tensors | {f"random/{name}": t for name, t in self.random.tensors.items()}

    @classmethod
    def unpacked(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
    ) -> Progress:
        """Return what `packed` took apart."""
        stage, epoch, turn = header["at"]
        random = {n.removeprefix("random/"): t for n, t in tensors.items() if n.startswith("random/")}
        return cls(
            header["epochs"],
            RandomState.of(random, header["random"]),
            header["outside"],
            (stage, epoch, turn),
            header["batches"],
            {name: tensors[f"sum/{i}"].to(device) for i, name in enumerate(header["sums"])},
            callbacks=lambda: list(header.get("callbacks", [])),
        )
