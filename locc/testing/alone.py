"""Runs some owners of a program alone, on what the others handed them in a run of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from locc.lower import Instruction, Loop, Plan, Segment, instructions_of
from locc.program import Program
from locc.runtime.untouched import untouched
from locc.snapshot import preserved, same_bits

from .trial import Holdings, State, Trial, twin, unit


@dataclass(frozen=True)
class Handed:
    """What one run of an instruction left for others: its values, and the shared tensors it changed."""

    values: dict[str, Any]
    state: dict[int, Tensor]


class Tape:
    """Records what each instruction of a plan hands on, in the order of its runs.

    `watched` (by id) are parameters and buffers: what an instruction makes of them is recorded as well.
    """

    def __init__(self, watched: Mapping[int, Tensor] | None = None) -> None:
        self.watched = dict(watched or {})
        self.before = twin(self.watched)
        self.runs: dict[int, list[Handed]] = {}

    def record(self, instruction: Instruction, values: dict[str, Any]) -> None:
        """Note what an instruction left; an observer of the executor."""
        if isinstance(instruction, Loop):  # its body was recorded, round by round
            return
        changed = [i for i, t in self.watched.items() if not same_bits(t.detach(), self.before[i])]
        self.before.update((i, twin(self.watched[i])) for i in changed)
        written = {name: twin(values[name]) for name in instruction.writes}
        state = {i: self.before[i] for i in changed}
        self.runs.setdefault(id(instruction), []).append(Handed(written, state))

    def only(self, plan: Plan, owners: frozenset[str], state: Iterable[int] = ()) -> Plan:
        """Return a plan with the instructions of some owners, to which the tape plays all others.

        Steps of it play one run after the other; of the watched tensors, those with an id in `state`.

        Raises:
            MissingError: when it runs and an owner needs what was not recorded.
        """
        needed, state = _needed(plan, owners), frozenset(state)

        def chosen(instructions: list[Instruction]) -> list[Instruction]:
            found: list[Instruction] = []
            for instruction in instructions:
                if isinstance(instruction, Loop):
                    carried = tuple(pair for pair in instruction.carried if pair[1] in needed)
                    body = chosen(instruction.body)
                    found.append(replace(instruction, body=body, carried=carried, frees=()))
                elif instruction.owner in owners:
                    found.append(instruction)
                else:
                    found.append(self._play(instruction, needed, state))
            return found

        return replace(plan, instructions=chosen(plan.instructions))

    def _play(self, instruction: Instruction, needed: set[str], state: frozenset[int]) -> Segment:
        """Return a segment that stands for an instruction of another owner."""
        names = tuple(name for name in instruction.writes if name in needed)
        place = 0

        def hand(_: object) -> tuple[Any, ...]:
            nonlocal place
            runs = self.runs.get(id(instruction), [])
            place += 1
            if place > len(runs):
                if names:
                    raise MissingError(instruction.owner, names)
                return ()
            handed = runs[place - 1]
            with torch.no_grad():
                for i in state & handed.state.keys():
                    self.watched[i].copy_(handed.state[i])
            return tuple(twin(handed.values[name]) for name in names)

        return Segment(instruction.owner, False, hand, (), (), names)


def _needed(plan: Plan, owners: frozenset[str]) -> set[str]:
    """Return the names that the instructions of the owners read, from round to round included."""
    every = list(instructions_of(plan.instructions))
    needed = {n for i in every if i.owner in owners and not isinstance(i, Loop) for n in i.reads}
    carried = [pair for i in every if isinstance(i, Loop) for pair in i.carried]
    before = -1
    while len(needed) > before:
        before = len(needed)
        for initial, entry, end in carried:
            if entry in needed:
                needed |= {initial, end}
    return needed


class MissingError(Exception):
    """An owner needs a value that its producer has not computed yet."""

    def __init__(self, producer: str, names: tuple[str, ...]) -> None:
        super().__init__(f"needs {', '.join(repr(n) for n in names)} of '{producer}' before it is computed")


class Whole:
    """A run of a whole program, and runs of some of its owners alone on what that run handed them.

    With `watching=True`, what becomes of every tensor in the run is known, not of the shared ones alone.

    Attributes:
        states: owner -> what it held after the run.
    """

    def __init__(self, program: Program, values: list[Any], watching: bool = False) -> None:
        self.program, self.values = program, values
        self.plan = program.plan(program.phase)
        self.steps = unit(program, self.plan)
        self.holdings = Holdings(program)
        with untouched(program):
            every = {i: item.tensor for i, item in self.holdings.everything.items()}
            self.tape = Tape(every if watching else self.holdings.shared)
            trial = Trial(program, guarded=True)  # a run that is NaN throughout would show nothing
            done = [trial.run(self.plan, values, i, self.tape.record) for i in range(self.steps)]
            self.states = {o: self.holdings.state(o, done) for o in program.ir.owners}

    def alone(self, owner: str, beside: frozenset[str] = frozenset(), spared: Iterable[int] = ()) -> State:
        """Return what an owner holds after the same steps without the others.

        Every parameter and buffer that it does not use is NaN (or garbage, where there is no NaN), and
        what other modules keep in Python is what a run on another batch left.

        Args:
            owner: the owner.
            beside: other owners that run as well.
            spared: ids of tensors that are as in the whole run, though the owner does not use them.
        """
        owners = beside | {owner}
        kept = {i: t for o in owners for i, t in self.holdings.used[o].items()}
        kept.update((i, self.holdings.everything[i].tensor) for i in spared)
        with untouched(self.program):
            self._distract(owners, kept)
            self._spoil(kept)
            trial = Trial(self.program)
            plan = self.tape.only(self.plan, owners, {*self.holdings.shared, *spared})
            done = [trial.run(plan, self.values, i) for i in range(self.steps)]
            return self.holdings.state(owner, done)

    def _distract(self, owners: frozenset[str], kept: dict[int, Tensor]) -> None:
        """Run the whole program on another batch; only what the owners use is put back."""
        other = tree_map(_another, self.values)
        optimizers = [o for name, o in self.program.optimizers.items() if name in owners]
        with preserved(self.holdings.together(owners, kept), optimizers), suppress(Exception):
            # A model may refuse such a batch; what it left behind until then does as well.
            trial = Trial(self.program)
            for i in range(self.steps + 1):  # one more, so that a counter differs, too
                trial.run(self.plan, other, i)

    def _spoil(self, kept: dict[int, Tensor]) -> None:
        memory = {t.untyped_storage().data_ptr() for t in kept.values()}
        for i, item in self.holdings.everything.items():
            tensor = item.tensor.detach()
            overlaps = any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            if i in kept or overlaps or tensor.untyped_storage().data_ptr() in memory:
                continue
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            else:
                tensor.bitwise_not_()


def _another(value: Any) -> Any:
    """Return other values of the same kind: reversed, and floating-point ones halved."""
    if not isinstance(value, Tensor):
        return value
    turned = value.flip(list(range(value.dim())))
    return turned * 0.5 if value.is_floating_point() else turned
