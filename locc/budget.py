"""`fit`: the fewest modules whose training keeps to a budget of memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from locc.errors import LoccError, SplitError
from locc.partition import Place, best_cuts
from locc.runtime.records import size_of


@dataclass(frozen=True)
class MemoryBudget:
    """A budget of bytes for training on batches of a size."""

    memory: int
    batch: int

    def __str__(self) -> str:
        return f"splits=locc.fit(memory={self.memory}, batch={self.batch})"


def fit(memory: int | str, batch: int) -> MemoryBudget:
    """Ask, as `splits` of `compile`, for the fewest modules that keep to a budget.

    Within it stay parameters and buffers (auxiliary networks included), optimizer state, activations and
    gradients, as estimated for `Certificate.memory`, the last two with 2 % more, by which the estimate may
    be wrong; not what operators and optimizers allocate and free inside one call, nor PyTorch itself, nor
    what the schedules "wave", "pipelined" and "replay" keep of several batches. With `offload=`, parameters
    and state are those of one module at a time ("cpu": and of the largest other one). Cuts fall between the
    blocks that `splits=K` would cut between.

    Args:
        memory: in bytes, or as "500MB", "2GiB".
        batch: number of samples of a step.

    Raises:
        LoccError: one of the two is no number above 0.
    """
    if type(batch) is not int or batch < 1:
        raise LoccError(f"locc.fit(batch={batch!r}): give the number of samples of a step, at least 1")
    return MemoryBudget(size_of(memory, "memory"), batch)


@dataclass(frozen=True)
class Load:
    """What a step takes at the worst moment of an owner, in bytes.

    Attributes:
        owner: its name.
        index: position of the module that it is, or serves.
        parameters: of all owners; where these wait in files, its own.
        optimizer: state, in the same way.
        step: activations and gradients.
    """

    owner: str
    index: int
    parameters: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.step


Weigh = Callable[[Sequence[int]], Sequence[Load]]
"""Takes the indices of the places after which to cut; raises LoccError where these make no program."""


def fewest(wanted: MemoryBudget, places: Sequence[Place], weigh: Weigh) -> list[str]:
    """Return where to cut a model into the fewest modules that keep to a budget.

    Cuts are expected to take what the modules among them took that were weighed, and for others a little less
    than what their parts suggest; the best of those with the fewest modules that could keep to the budget are
    weighed, until these are known.

    Raises:
        SplitError: no cut keeps to it.
        LoccError: what `weigh` raises without a cut.
    """
    search = _Search(places, weigh)
    while True:
        options = search.options()
        within = next((option for option in options if option[0] <= wanted.memory), None)
        _, cuts = within or min(options)
        if cuts not in search.tried:
            search.attempt(cuts)
        elif within:
            return [places[i].path for i in cuts]
        else:
            raise SplitError(_refusal(wanted, *search.least))


def _refusal(wanted: MemoryBudget, cuts: Sequence[int], loads: Sequence[Load]) -> str:
    """Say what is too large, and by how much."""
    worst = max(loads, key=lambda load: load.total)
    where = "the whole model" if not cuts else f"with {len(cuts) + 1} modules, the least, '{worst.owner}'"
    return (
        f"{wanted}: no cut keeps to that; {where} takes {worst.total} bytes, "
        f"{worst.total - wanted.memory} too many: {worst.parameters} for parameters, {worst.optimizer} for "
        f"optimizer state, {worst.step} for activations and gradients. Give more memory, a smaller batch, an "
        "optimizer with less state, or offload='disk'"
    )


_SHARE = 0.8
"""Of what its parts suggest, a module that nobody has weighed is expected to take so much at least."""


class _Search:
    """What is known, and expected, of cuts.

    Attributes:
        tried: the largest load with cuts that were weighed; none where they make no program.
        least: the cuts with the least of these, and their loads.
    """

    def __init__(self, places: Sequence[Place], weigh: Weigh) -> None:
        self.weigh, self.size = weigh, len(places)
        self.trains, self.faults = [p.trains for p in places], [p.faults for p in places]
        self.tried: dict[tuple[int, ...], float] = {}
        self._known: dict[tuple[int, int], float] = {}
        self.least: tuple[tuple[int, ...], Sequence[Load]] = (), weigh(())
        self._take(*self.least)
        self._expect(float(self.tried[()]))

    def options(self) -> list[tuple[float, tuple[int, ...]]]:
        """Return the best cuts for each number of modules, with the largest load that is expected of them."""
        found = []
        for ends in best_cuts(self._cost, self.trains, self.faults, max(1, sum(self.trains))):
            if ends is not None:
                cuts = tuple(ends)
                expected = max(self._cost(*part) for part in self._parts(cuts))
                found.append((self.tried.get(cuts, expected), cuts))
        return found

    def attempt(self, cuts: tuple[int, ...]) -> None:
        """Weigh what comes of cuts."""
        try:
            self._take(cuts, self.weigh(cuts))
        except LoccError:  # these cuts, or the method on them, make no program
            self.tried[cuts] = float("inf")

    def _take(self, cuts: tuple[int, ...], loads: Sequence[Load]) -> None:
        for index, part in enumerate(self._parts(cuts)):
            self._known[part] = max((load.total for load in loads if load.index == index), default=0)
        self.tried[cuts] = max((load.total for load in loads), default=0)
        if self.tried[cuts] < self.tried[self.least[0]]:
            self.least = cuts, loads

    def _expect(self, whole: float) -> None:
        """Expect of a group what its parts in the finest cut take, less what all of these have in common."""
        finest = best_cuts(lambda start, end: end - start, self.trains, self.faults, max(1, sum(self.trains)))
        cuts = tuple(next(ends for ends in reversed(finest) if ends is not None))
        if cuts not in self.tried:
            self.attempt(cuts)
        parts = self._parts(cuts)
        takes = [self._known.get(part, whole * (part[1] - part[0]) / self.size) for part in parts]
        self._common = max(0.0, sum(takes) - whole) / max(len(parts) - 1, 1)
        self._sums = [0.0]
        for (start, end), taken in zip(parts, takes, strict=True):
            share = (taken - self._common) / (end - start)
            self._sums += [self._sums[-1] + share * i for i in range(1, end - start + 1)]

    def _cost(self, start: int, end: int) -> float:
        expected = _SHARE * (self._sums[end] - self._sums[start]) + self._common
        return self._known.get((start, end), expected)

    def _parts(self, cuts: Sequence[int]) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *(i + 1 for i in cuts), self.size]))
