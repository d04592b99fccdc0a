"""Cuts a plan into programs: what some owners run, and what passes between them and the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from locc.lower.instructions import Instruction, Loop, Plan, Receive, Send, instructions_of, release


def project(plan: Plan, owners: Iterable[str]) -> Plan:
    """Return the program of some owners: what they run, with a Send or Receive for each value that crosses.

    Programs of disjoint owners that cover a plan, run side by side, compute what the plan does: each keeps
    the plan's order, a Send never waits, and random streams belong to nodes. A value is received before its
    first reader and sent after its maker; inside of a repeated region, once a round.

    Args:
        plan: a plan as `lower` returns it, in which no Send or Receive is.
        owners: whose program.
    """
    chosen = frozenset(owners)
    cut = _Cut(plan, chosen, _makers(plan.instructions))
    instructions = cut.program()
    release(instructions)
    return replace(
        plan,
        instructions=instructions,
        trains=tuple(o for o in plan.trains if o in chosen),
        loss=plan.loss if cut.maker.get(plan.loss or "") in chosen else None,
        runs=tuple(o for o in plan.runs if o in chosen),
    )


def gathered(plan: Plan) -> Plan:
    """Return a plan in which an owner receives before its code and sends after it.

    What it waits for has to be there then: so it is where the programs run one after the other.
    """
    found: list[Instruction] = []
    receives: list[Instruction] = []
    sends: list[Instruction] = []
    code: list[Instruction] = []
    for instruction in [replace(i, frees=()) for i in plan.instructions]:
        if isinstance(instruction, Receive):
            receives.append(instruction)
        elif isinstance(instruction, Send):
            sends.append(instruction)
        else:
            if code and instruction.owner != code[-1].owner:
                found += [*receives, *code, *sends]
                receives, sends, code = [], [], []
            code.append(instruction)
    found += [*receives, *code, *sends]
    release(found)
    return replace(plan, instructions=found)


@dataclass
class _Cut:
    plan: Plan
    chosen: frozenset[str]
    maker: Mapping[str, str]

    def program(self) -> list[Instruction]:
        """Return the chosen owners' part of the plan."""
        found: list[Instruction] = []
        known = set(self.plan.inputs)
        outside = _readers(self.plan.instructions)
        for instruction in self.plan.instructions:
            if isinstance(instruction, Loop):
                found += self._loop(instruction, known, outside)
            else:
                found += self._one(instruction, known, outside)
        return found

    def _one(self, instruction: Instruction, known: set[str], readers: Readers) -> list[Instruction]:
        """Return an instruction between what it waits for and what it hands on, if it is the owners'."""
        if instruction.owner not in self.chosen:
            return []
        found = self._receives(instruction.reads, known)
        known.update(instruction.writes)
        return [*found, replace(instruction, frees=()), *self._sends(instruction.writes, readers)]

    def _loop(self, loop: Loop, known: set[str], outside: Readers) -> list[Instruction]:
        inside = _readers_inside(loop)
        read = {name for name, owners in inside.items() if owners & self.chosen}
        if not any(i.owner in self.chosen for i in instructions_of(loop.body)):
            return []
        carried = tuple(c for c in loop.carried if c[1] in read)
        entries, made = {c[1] for c in carried}, {n for i in loop.body for n in i.writes}
        first = dict.fromkeys([*(c[0] for c in carried), *sorted(read - made - {c[1] for c in loop.carried})])
        found = self._receives(first, known)
        here = known | entries
        body = [i for step in loop.body for i in self._one(step, here, inside)]
        body += self._receives((c[2] for c in carried), here)
        writes = tuple(n for n in loop.writes if n in here)
        release(body, keep=known | entries | {*writes, *(c[2] for c in carried)})
        known.update(writes)
        owner = next(i.owner for i in body if i.owner in self.chosen)
        found.append(Loop(owner, loop.name, loop.times, carried, body, tuple(first), writes))
        late = {n: outside.get(n, set()) - inside.get(n, set()) for n in loop.writes}
        return found + self._sends((n for n in loop.writes if self.maker[n] in self.chosen), late)

    def _receives(self, names: Iterable[str], known: set[str]) -> list[Instruction]:
        new = [name for name in dict.fromkeys(names) if name not in known]
        known.update(new)
        owner = next(o for o in self.plan.runs if o in self.chosen)
        return [Receive(owner, name, self.maker[name], self.plan.specs.get(name)) for name in new]

    def _sends(self, names: Iterable[str], readers: Readers) -> list[Instruction]:
        found: list[Instruction] = []
        for name in names:
            to = tuple(o for o in self.plan.runs if o in readers.get(name, ()) and o not in self.chosen)
            if to:
                found.append(Send(self.maker[name], name, to, self.plan.specs.get(name)))
        return found


Readers = Mapping[str, set[str]]


def _makers(instructions: list[Instruction]) -> dict[str, str]:
    every = [i for i in instructions_of(instructions) if not isinstance(i, Loop)]
    return {name: i.owner for i in every for name in i.writes}


def _readers(instructions: list[Instruction]) -> dict[str, set[str]]:
    """Return the owners that read each value; a region reads, before it starts, what it does not make."""
    found: dict[str, set[str]] = {}
    for instruction in instructions:
        if isinstance(instruction, Loop):
            inside = _readers_inside(instruction)
            made = {name for i in instruction.body for name in i.writes}
            for first, entry, _ in instruction.carried:
                found.setdefault(first, set()).update(inside.get(entry, ()))
            for name in inside.keys() - made - {entry for _, entry, _ in instruction.carried}:
                found.setdefault(name, set()).update(inside[name])
        else:
            for name in instruction.reads:
                found.setdefault(name, set()).add(instruction.owner)
    return found


def _readers_inside(loop: Loop) -> dict[str, set[str]]:
    """Return the owners that read each value in a round, or carry it to the next one."""
    found = _readers(loop.body)
    for _, entry, end in loop.carried:
        found.setdefault(end, set()).update(found.get(entry, ()))
    return found
