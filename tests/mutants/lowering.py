"""Mutants of the lowering: plans and module programs that compute something else than the graph means.

`sites` yields all that can go wrong with a program. `Judge` runs each mutant, sees whether a number changes,
and whether `assert_lowered` (`assert_side_by_side` for what passes between modules) notices.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import networkx as nx
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import locc
import locc.lower as low
from locc.errors import LoccError
from locc.ir import TrainingGraph, ops
from locc.ir.view import draws
from locc.lower import Backward, Instruction, Loop, Plan, Segment, Send, code, tasks
from locc.runtime.backends import Eager
from locc.runtime.untouched import untouched
from locc.testing import Case, ModelSpec, assert_lowered, assert_side_by_side
from locc.testing.beside import run_beside
from locc.testing.trial import Trial
from testing import two_weights

from .subjects import SHAPES, Subject, subject

Made = Plan | Mapping[str, low.ModuleProgram]
Change = Callable[[list[Instruction], int], Any]
"""Changes a list of instructions at the place of that number."""
WRITES = (low.Update, low.Assign)
BY_HAND: dict[str, Callable[[TrainingGraph], None]] = {
    f.__name__: f for f in (two_weights.kept, two_weights.delayed, two_weights.rounds, two_weights.three)
}


@dataclass(frozen=True)
class Site:
    """A mutation: its kind, where it applies, what makes it, and what is patched while it runs."""

    operator: str
    where: str
    make: Callable[[], Made]
    patched: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Verdict:
    """What a mutant does ("same": it changes no number; "wrong"; "fails"), and whether that is noticed."""

    method: str
    shape: str
    operator: str = ""
    where: str = ""
    truth: str = "same"
    killed: bool = False

    @property
    def survives(self) -> bool:
        """Whether a number changes and nothing says so."""
        return self.truth != "same" and not self.killed


COLUMNS: dict[str, Callable[[Verdict], bool]] = {
    "change a number": lambda v: v.truth != "same",
    "by failing": lambda v: v.truth == "fails",
    "killed": lambda v: v.killed,
    "same": lambda v: v.truth == "same",
    "survivors": lambda v: v.survives,
}


class Judge:
    """Judges the mutants of a program in one of its phases."""

    def __init__(self, found: Subject, phase: str | None = None) -> None:
        self.program, self.phase, self.batch = found.program, phase, (found.x, found.y)
        self.program.phase = phase
        self.trains = next((frozenset(p.trains) for p in self.program.phases if p.name == phase), None)
        self.analysis = tasks.analyse(self.program.ir, self.trains)
        self.plan = self.lower()
        self.verdict = Verdict(found.method, f"{found.shape}, {phase}" if phase else found.shape)
        self.clean = self.run(self.lower())

    def lower(self, *patches: Any) -> Plan:
        """Return a new plan, lowered with a function patched: its module, name and stand-in."""
        with patch.object(*patches) if patches else nullcontext():
            return low.lower(self.program.ir, self.trains)

    def judge(self, site: Site) -> Verdict:
        """Return the verdict on one mutant."""
        self.program.phase = self.phase
        verdict = replace(self.verdict, operator=site.operator, where=site.where, truth="fails")
        with site.patched():
            try:
                made = site.make()
            except LoccError:
                return replace(verdict, killed=True)
            with suppress(Exception):  # whatever a wrong plan meets with
                verdict = replace(verdict, truth="same" if self.run(made) == self.clean else "wrong")
            try:
                if verdict.truth != "same" and isinstance(made, Plan):
                    assert_lowered(self.program, *self.batch, plan=made)
                elif verdict.truth != "same":
                    assert_side_by_side(self.program, [self.batch] * 2, programs=made)
            except (AssertionError, LoccError):
                return replace(verdict, killed=True)
        return verdict

    def run(self, made: Made) -> list[bytes]:
        """Return the bits of all that two steps leave and report."""
        program = self.program
        with untouched(program):
            values = [program.bind(*self.batch) for _ in range(2)]
            torch.manual_seed(0)
            if isinstance(made, Plan):
                trial = Trial(program, guarded=True)
                reports = [trial.report(made, batch, i) for i, batch in enumerate(values)]
            else:
                with program.in_phase():
                    reports = run_beside(program, values, made)
            left: list[Any] = [*program.root.parameters(), *program.root.buffers()]
            left += [p.grad for p in program.root.parameters()]
            for optimizer in program.optimizers.values():
                left += [value for held in optimizer.state.values() for value in held.values()]
            for report in reports:
                left += [report.network_loss, *(v for _, v in sorted(report.objectives.items()))]
            return [v.detach().numpy().tobytes() if isinstance(v, Tensor) else repr(v).encode() for v in left]


def programs() -> Iterator[tuple[str, str]]:
    """Yield every (method, shape), tied weights among the shapes, and the graphs written by hand."""
    yield from ((method, shape) for method in sorted(locc.methods()) for shape in (*SHAPES, "tied"))
    yield from (("by hand", name) for name in BY_HAND)


def found(method: str, shape: str) -> Subject | None:
    """Return a program; None where the method refuses the shape."""
    if shape in BY_HAND:
        return Subject(method, shape, two_weights.program(BY_HAND[shape]), two_weights.X, two_weights.Y)
    if shape != "tied":
        return subject(method, shape)
    case = Case(ModelSpec("tied", ("tanh",)), method)
    return None if case.refusal() else Subject(method, shape, case.compile(verify=False), *case.batch())


def work(task: tuple[str, str, int | None]) -> list[Verdict]:
    """Judge the mutants of a program in each phase, at most so many of a kind, if there is such a program."""
    method, shape, each = task
    torch.set_num_threads(1)
    program, verdicts = found(method, shape), []
    for phase in [p.name for p in program.program.phases] or [None] if program is not None else ():
        judge = Judge(program, phase)
        every = sorted(sites(judge), key=lambda s: (s.operator, s.where))
        for _, group in itertools.groupby(every, key=lambda s: s.operator):
            kind = list(group)
            verdicts += [judge.judge(s) for s in kind[:: -(-len(kind) // (each or len(kind)))]]
    return verdicts


# ---- what can go wrong -----------------------------------------------------------------------


def sites(judge: Judge) -> Iterator[Site]:
    """Yield every mutant of a program."""
    for kind in (_order, _code, _streams, _instructions, _programs):
        yield from kind(judge)


def _order(judge: Judge) -> Iterator[Site]:
    """An ordering edge is missing, of those that no other path implies."""
    real, graphs = tasks.task_graph, []
    judge.lower(tasks, "task_graph", lambda *given: graphs.append(real(*given)) or graphs[-1])

    def lowered(number: int, edge: Any) -> Plan:
        calls = itertools.count()

        def graph(*given: Any) -> Any:
            return nx.restricted_view(real(*given), [], [edge] if next(calls) == number else [])

        return judge.lower(tasks, "task_graph", graph)

    for number, graph in enumerate(graphs):
        for edge in nx.transitive_reduction(graph).edges:
            yield Site("drop an ordering edge", " -> ".join(map(str, edge)), partial(lowered, number, edge))


def _code(judge: Judge) -> Iterator[Site]:
    """A value passes with its tape; what a gradient is taken of is no leaf."""
    real = code._copy

    def copied(only: Any, uncut: bool, graph: Any, node: Any, copies: Any, leaf: bool) -> Any:
        if node is only and uncut:
            return copies[node.args[0]]
        return real(graph, node, copies, leaf and node is not only)

    for node in judge.analysis.needed:
        made = partial(judge.lower, code, "_copy")
        if node.target is ops.stop_gradient:
            yield Site("pass on the tape", node.name, partial(made, partial(copied, node, True)))
        if node in judge.analysis.leaves:
            yield Site("make no leaf", node.name, partial(made, partial(copied, node, False)))


def _streams(judge: Judge) -> Iterator[Site]:
    """A node draws from the stream of the one before it, or goes on with what was started last."""
    real, root = Eager.stream, judge.program.ir.root
    names = [n.name for n in judge.program.ir.graph.nodes if n in judge.analysis.needed and draws(root, n)]

    def site(operator: str, name: str, stream: Callable[[Eager, str], Any]) -> Site:
        return Site(operator, name, judge.lower, partial(patch.object, Eager, "stream", stream))

    for before, name in zip([None, *names], names, strict=False):
        yield site("start no stream", name, lambda m, n, k=name: n == k or real(m, n))
        if before is not None:
            yield site("share a stream", name, lambda m, n, k=name, b=before: real(m, b if n == k else n))


def _instructions(judge: Judge) -> Iterator[Site]:
    """An instruction of the plan is missing, misplaced or wrong in itself."""
    for number, (held, at) in enumerate(_places(judge.plan.instructions)):
        i, make = held[at], partial(_edited, judge.plan, number)
        here = f"{type(i).__name__} {number} of {i.owner}"
        for operator, change in _wrong(i):
            yield Site(operator, here, partial(make, change))
        for k in range(at + 1, len(held)):
            writes = any(isinstance(w, (*WRITES, Backward)) for w in (i, held[k]))
            if {*i.writes} & {*held[k].reads} or (writes and held[k].owner == i.owner):
                yield Site("move behind a dependent", f"{here}, {k}", partial(make, _behind(k)))
        for name in i.frees:
            for k in [k for k in range(at) if name in (*held[k].reads, *held[k].writes)][-1:]:
                yield Site("release too early", name, partial(make, _early(name, k), releases=True))
        if isinstance(i, WRITES):
            yield Site("write under a value", here, judge.lower, partial(_uncopied, "protect", i))
    yield Site("report no loss", "", lambda: replace(judge.plan, loss=None))


def _places(instructions: list[Instruction]) -> Iterator[tuple[list[Instruction], int]]:
    """Yield each instruction as the list that it is in and its number there."""
    for number, instruction in enumerate(instructions):
        yield instructions, number
        if isinstance(instruction, Loop):
            yield from _places(instruction.body)


def _edited(plan: Plan, number: int, change: Change, releases: bool = False) -> Plan:
    made = copy.deepcopy(plan)
    for instruction in () if releases else low.instructions_of(made.instructions):
        instruction.frees = ()
    change(*list(_places(made.instructions))[number])
    return made


def _wrong(i: Instruction) -> Iterator[tuple[str, Change]]:
    yield "skip an instruction", list.pop
    yield "run an instruction twice", _twice
    if isinstance(i, Segment):
        yield from [("keep no tape", _with(taped=False))] * i.taped
        yield from (
            ("mix up what is read", _with(reads=_swapped(i.reads, k))) for k in range(1, len(i.reads))
        )
    elif isinstance(i, Backward):
        yield from [("retain too little", _with(retain=False))] * i.retain
        yield from [("train on no objective", _with(objectives=()))] * bool(i.objectives and i.gradients)
        names, of = [n for n, _ in i.gradients], tuple(v for _, v in i.gradients)
        for k in range(1, len(of)):
            yield "mix up gradients", _with(gradients=tuple(zip(names, _swapped(of, k), strict=True)))
    elif isinstance(i, Loop):
        yield "a round too few", _with(times=i.times - 1)
        for k, (first, entry, last) in enumerate(i.carried):
            for end in (e for e in (first, i.carried[k - 1][2]) if e != last):
                carried = (*i.carried[:k], (first, entry, end), *i.carried[k + 1 :])
                yield "mix up what is carried", _with(carried=carried)


def _swapped(names: tuple[str, ...], k: int) -> tuple[str, ...]:
    return (*names[: k - 1], names[k], names[k - 1], *names[k + 1 :])


def _with(**fields: Any) -> Change:
    return lambda held, at: held.__setitem__(at, replace(held[at], **fields))


def _twice(held: list[Instruction], at: int) -> None:
    held.insert(at, replace(held[at], **({"retain": True} if isinstance(held[at], Backward) else {})))


def _behind(k: int) -> Change:
    return lambda held, at: held.insert(k, held.pop(at))


def _early(name: str, k: int) -> Change:
    def change(held: list[Instruction], at: int) -> None:
        held[at].frees = tuple(n for n in held[at].frees if n != name)
        held[k].frees = (*held[k].frees, name)

    return change


def _programs(judge: Judge) -> Iterator[Site]:
    """What passes between modules is lost, doubled, late, for fewer, or not what it was."""

    def made(name: str, number: int, change: Change) -> dict[str, low.ModuleProgram]:
        return {**programs, name: replace(programs[name], plan=_edited(programs[name].plan, number, change))}

    programs = judge.program.module_programs
    for name, program in programs.items():
        for number, (held, at) in enumerate(_places(program.plan.instructions)):
            i, make = held[at], partial(made, name, number)
            if isinstance(i, (Send, low.Receive)):
                yield Site("pass nothing", f"{type(i).__name__} {number} of {name}", partial(make, list.pop))
            if isinstance(i, Send):
                where = f"{i.value} of {name}"
                yield Site("send twice", where, partial(make, _twice))
                yield Site("send no copy", where, partial(make, _with()), partial(_uncopied, "send", i))
                yield from [Site("send to fewer", where, partial(make, _with(to=i.to[1:])))] * (len(i.to) > 1)
                for k in [k for k in range(at + 1, len(held)) if isinstance(held[k], WRITES)][:1]:
                    yield Site("send after a write", where, partial(make, _behind(k)))


def _uncopied(what: str, only: Instruction) -> AbstractContextManager[Any]:
    """Leave out the copies that a machine makes before one instruction."""
    real = getattr(Eager, what)

    def run(machine: Eager, task: Any, *given: Any) -> None:
        if str(replace(task, frees=())) != str(replace(only, frees=())):
            real(machine, task, *given)
        elif isinstance(task, Send):
            value = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, machine.values[task.value])
            machine._connected().send(task, value)

    return patch.object(Eager, what, run)
