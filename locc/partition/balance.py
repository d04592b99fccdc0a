"""K modules of about equal cost, by counted (not timed) work, so that the cuts are the same in every run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from locc.errors import SplitError
from locc.ir.captured import Inputs
from locc.snapshot import preserved


@dataclass
class _Unit:
    path: str
    module: nn.Module
    cost: float
    spans: list[tuple[int, int]] = field(default_factory=list)
    rows: int | None = None
    children: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """How often it is called."""
        return len(self.spans)


def balanced_cuts(model: nn.Module, inputs: Inputs, count: int) -> list[str]:
    """Return the submodules after which to cut for `count` modules of balanced cost.

    The cost of a submodule is the number of floating-point operations of its forward on the example
    inputs (matrix products and convolutions), plus its parameters, which cost an update each. Places that
    part two users of one parameter, or where a value has not one row for each sample (windows, patches),
    are taken only where there are no others.

    Raises:
        SplitError: the model has fewer than `count` submodules that could stand alone.
    """
    if count == 1:
        return []
    found = _places(model, inputs, f"splits={count}", count, count)
    trains = [place.trains for place in found]
    if sum(trains) < count:
        raise SplitError(
            f"splits={count}: the model has only {sum(trains)} submodules with parameters that are called "
            "once and could become a module; give fewer, or names"
        )
    sums = list(itertools.accumulate((place.cost for place in found), initial=0.0))
    cuts = best_cuts(lambda start, end: sums[end] - sums[start], trains, [p.faults for p in found], count)
    return [found[i].path for i in cuts[-1] or ()]


@dataclass(frozen=True)
class Place:
    """A submodule after which a cut may fall.

    Attributes:
        path: its name.
        cost: as in `balanced_cuts`.
        trains: whether it has a parameter to train.
        faults: what speaks against a cut there: parameters that it would part, values without a row for each
            sample.
    """

    path: str
    cost: float
    trains: bool
    faults: int


def places(model: nn.Module, inputs: Inputs, asked: str) -> list[Place]:
    """Return, in the order of the forward, the blocks of a model; there are two at least where it has two.

    Raises:
        SplitError: the model cannot be called.
    """
    return _places(model, inputs, asked, 2, float("inf"))


def _places(model: nn.Module, inputs: Inputs, asked: str, least: int, share: float) -> list[Place]:
    units = _profile(model, inputs, asked)
    groups = [u for u in _expand(units, least, share) if u.calls == 1]
    faults, samples = _parted(units, groups), _rows(inputs)
    return [
        Place(
            unit.path,
            unit.cost,
            any(p.requires_grad for p in unit.module.parameters()),
            parted + (unit.rows not in (None, samples)),
        )
        for unit, parted in zip(groups, faults, strict=True)
    ]


class _Operations(TorchDispatchMode):
    """Counts floating-point operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _profile(model: nn.Module, inputs: Inputs, asked: str) -> dict[str, _Unit]:
    try:
        units = {name: _Unit(name, module, 0.0) for name, module in model.named_modules()}
        with preserved(model):
            _measure(model, inputs, {unit.module: unit for unit in units.values()})
    except Exception as error:
        raise SplitError(
            f"{asked}: the cost of the submodules cannot be measured, which takes one call of the "
            f"model: {type(error).__name__}: {error}; name the splits instead"
        ) from error
    for unit in units.values():
        unit.cost += sum(p.numel() for p in unit.module.parameters())
    for name, unit in units.items():
        prefix = f"{name}." if name else ""
        unit.children = [c for c in units if c.startswith(prefix) and c != name and units[c].calls]
    return units


def _measure(model: nn.Module, inputs: Inputs, units: dict[nn.Module, _Unit]) -> None:
    """Run the model, and note for each submodule when it is called and how many operations that takes."""
    counter, clock, started = _Operations(), itertools.count(), list[tuple[int, int]]()

    def enter(module: nn.Module, *_: object) -> None:
        started.append((counter.count, next(clock)))

    def leave(module: nn.Module, _: object, output: object) -> None:
        unit, (count, start) = units[module], started.pop()
        unit.cost += counter.count - count
        unit.spans.append((start, next(clock)))
        unit.rows = _rows(output)

    for module in units:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)
    with torch.random.fork_rng(), torch.no_grad(), counter:
        model(*inputs.args, **inputs.kwargs)


def _rows(value: Any) -> int | None:
    """Return the leading size of the first tensor in a value."""
    leaves = torch.utils._pytree.tree_leaves(
        (value.args, value.kwargs) if isinstance(value, Inputs) else value
    )
    return next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), None)


def _parted(units: dict[str, _Unit], groups: list[_Unit]) -> list[int]:
    """Count, for a cut after each of `groups`, the parameters that are used before and behind it."""
    users: dict[nn.Parameter, list[tuple[int, int]]] = {}
    for unit in units.values():
        for parameter in unit.module.parameters(recurse=False):
            if parameter.requires_grad:
                users.setdefault(parameter, []).extend(unit.spans)
    shared = [spans for spans in users.values() if len(spans) > 1]
    ends = [unit.spans[0][1] for unit in groups]
    return [sum(min(spans)[1] <= end < max(spans)[0] for spans in shared) for end in ends]


def _expand(units: dict[str, _Unit], least: int, share: float) -> list[_Unit]:
    """Open the root, then the largest unit: chains above a `share`-th of all, others for `least` units."""
    total = units[""].cost
    chosen = _direct(units, "")
    while True:
        parametric = sum(1 for u in chosen if u.cost and any(True for _ in u.module.parameters()))
        large = [u for u in chosen if u.children and u.calls == 1]
        chains = [u for u in large if _is_chain(u.module) and u.cost * share > total]
        candidates = chains or (large if parametric < least else [])
        if not candidates:
            return sorted(chosen, key=lambda u: u.spans[-1])
        largest = max(candidates, key=lambda u: u.cost)
        inside = _direct(units, largest.path)
        chosen = [u for u in chosen if u is not largest] + inside


def _direct(units: dict[str, _Unit], path: str) -> list[_Unit]:
    """Return the nearest called descendants: containers such as ModuleList are not called."""
    below = units[path].children
    return [units[c] for c in below if not any(c.startswith(f"{other}.") for other in below if other != c)]


def _is_chain(module: nn.Module) -> bool:
    """Whether a module is made of blocks in a row, so that a cut between them is a natural one."""
    if isinstance(module, nn.Sequential):
        return True
    for part in module.modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)):
            blocks = [b for b in part if any(True for _ in b.children())]
            if len(blocks) >= 2:
                return True
    return False


def best_cuts(
    cost: Callable[[int, int], float], trains: list[bool], faults: list[int], most: int
) -> list[list[int] | None]:
    """Return, for 1 to `most` groups of places, the last place of each but the last.

    With the fewest faults, then the least largest cost; None where so many could not train.

    Args:
        cost: of the group of the places from `start` to before `end`.
        trains: whether something trains, by place; a group needs one.
        faults: of a cut, by place.
        most: number of groups.
    """
    size, training = len(trains), [0, *itertools.accumulate(trains)]
    costs = {
        (start, end): cost(start, end)
        for start in range(size)
        for end in range(start + 1, size + 1)
        if training[start] < training[end]
    }
    best = [[(float("inf"), float("inf"))] * (size + 1) for _ in range(most + 1)]
    cut = [[0] * (size + 1) for _ in range(most + 1)]
    best[0][0] = (0, 0.0)
    for k in range(1, most + 1):
        for end in range(k, size + 1):
            for start in range(k - 1, end):
                if (start, end) not in costs:
                    continue
                faulty, worst = best[k - 1][start]
                found = faulty + (faults[end - 1] if end < size else 0), max(worst, costs[start, end])
                if found < best[k][end]:
                    best[k][end], cut[k][end] = found, start
    return [_ends(cut, k, size) if best[k][size][0] < float("inf") else None for k in range(1, most + 1)]


def _ends(cut: list[list[int]], count: int, end: int) -> list[int]:
    ends = []
    for k in range(count, 0, -1):
        end = cut[k][end]
        ends.append(end - 1)
    return ends[-2::-1]
