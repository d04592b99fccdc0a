"""Each module's own program: what it receives, what it runs, what it sends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from locc.ir.graph import TrainingGraph
from locc.ir.spec import Spec
from locc.ir.time import ages
from locc.ir.view import DATA
from locc.lower.instructions import (
    Assign,
    Backward,
    Instruction,
    Loop,
    Plan,
    Receive,
    Segment,
    Send,
    Update,
    instructions_of,
    unknown,
)
from locc.lower.project import project


@dataclass(frozen=True)
class Received:
    """A value that a module's program waits for.

    Attributes:
        name: of the value.
        spec: its shape and dtype, None where it is no tensor (a target).
        source: the owner that computes it; "data" for the batch.
        staleness: how many steps ago the newest data came from which it is computed.
    """

    name: str
    spec: Spec
    source: str
    staleness: int = 0


@dataclass(frozen=True)
class Sent:
    """A value that a module's program hands to those of the owners `to`."""

    name: str
    spec: Spec
    to: tuple[str, ...]


@dataclass(frozen=True)
class ModuleProgram:
    """The program of a module and of the auxiliaries that serve it, or of other owners; prints as Python.

    Attributes:
        name: of the module.
        owners: the module, then its auxiliaries.
        receives: what it waits for, the batch included, in the order of first use.
        sends: what it hands on.
        plan: its instructions.
    """

    name: str
    owners: tuple[str, ...]
    receives: tuple[Received, ...]
    sends: tuple[Sent, ...]
    plan: Plan

    def __str__(self) -> str:
        return "\n".join(_text(self)) + "\n"


def module_programs(ir: TrainingGraph, plan: Plan) -> dict[str, ModuleProgram]:
    """Cut a plan into one program for each module, in forward order; auxiliaries run with what they serve."""
    found: dict[str, ModuleProgram] = {}
    for module in ir.modules:
        owners = sorted((o for o in ir.owners.values() if o.index == module.index), key=lambda o: o.auxiliary)
        found[module.name] = program_of(ir, plan, tuple(o.name for o in owners))
    return found


def program_of(ir: TrainingGraph, plan: Plan, owners: tuple[str, ...]) -> ModuleProgram:
    """Return the program of some owners, named after the first of them."""
    part = project(plan, owners)
    return ModuleProgram(owners[0], owners, _receives(ir, part), _sends(part), part)


def _receives(ir: TrainingGraph, plan: Plan) -> tuple[Received, ...]:
    age = {node.name: steps for node, steps in ages(ir).items()}
    found = [Received(n, plan.specs.get(n), DATA) for n in plan.inputs if n in plan.read]
    for instruction in instructions_of(plan.instructions):
        if isinstance(instruction, Receive):
            name = instruction.value
            found.append(Received(name, instruction.spec, instruction.source, age[name]))
    return tuple(dict.fromkeys(found))


def _sends(plan: Plan) -> tuple[Sent, ...]:
    every = instructions_of(plan.instructions)
    return tuple(dict.fromkeys(Sent(i.value, i.spec, i.to) for i in every if isinstance(i, Send)))


def _text(program: ModuleProgram) -> Iterator[str]:
    others = ", ".join(repr(o) for o in program.owners[1:])
    yield f"# module '{program.name}'" + (f" with {others}" if others else "")
    for item in program.receives:
        late = f", {item.staleness} step(s) old" if item.staleness else ""
        yield f"# receives {item.name} from {item.source}{_spec(item.spec)}{late}"
    for sent in program.sends:
        yield f"# sends {sent.name} to {', '.join(sent.to)}{_spec(sent.spec)}"
    batch = [n for n in program.plan.inputs if n in program.plan.read]
    yield f"def step({', '.join(['self', *batch])}):"
    yield from ("    " + line for line in _lines(program.plan.instructions) or ["pass"])


def _spec(spec: Spec) -> str:
    return f": {spec}" if spec is not None else ""


def _lines(instructions: list[Instruction]) -> list[str]:
    found: list[str] = []
    for i in instructions:
        if isinstance(i, Segment):
            found += i.text if i.taped else ["with no_grad():", *("    " + line for line in i.text)]
        elif isinstance(i, Backward):
            found.append(_backward(i))
        elif isinstance(i, Update):
            found.append(f"update({i.owner!r})")
        elif isinstance(i, Assign):
            found.append(f"assign({i.path!r}, {i.value})")
        elif isinstance(i, Send):
            found.append(f"send({i.value}, to={list(i.to)})")
        elif isinstance(i, Receive):
            found.append(f"{i.value} = receive({i.value!r}, source={i.source!r})")
        elif isinstance(i, Loop):
            found += _loop(i)
        else:
            raise unknown(i)
        if i.frees:
            found.append(f"del {', '.join(i.frees)}")
    return found


def _backward(task: Backward) -> str:
    names = f"  # {', '.join(task.objectives)}" if task.objectives else ""
    left = "".join(f"{name}, " for name, _ in task.gradients).removesuffix(" ")
    wrt = "".join(f", {leaf}" for _, leaf in task.gradients)
    return f"{left} = backward({task.scalar}{wrt}){names}" if left else f"backward({task.scalar}){names}"


def _loop(loop: Loop) -> list[str]:
    lines = [f"for round in range({loop.times}):"]
    for first, entry, end in loop.carried:
        lines.append(f"    {entry} = {first} if round == 0 else {end}")
    return [*lines, *("    " + line for line in _lines(loop.body))]
