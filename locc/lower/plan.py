"""A step as a list of instructions: straight-line code per owner, backward passes, updates, releases."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from torch import fx

from locc.errors import GraphError
from locc.ir import Phase, ops
from locc.ir.graph import TrainingGraph
from locc.ir.view import draws, stream_of
from locc.lower.code import compile_nodes, is_lent
from locc.lower.instructions import (
    Assign,
    Backward,
    Instruction,
    Loop,
    Plan,
    Segment,
    Update,
    instructions_of,
    release,
)
from locc.lower.tasks import (
    Analysis,
    BackwardTask,
    RegionTask,
    Task,
    UpdateTask,
    analyse,
    argument,
    order,
)


def lower(
    ir: TrainingGraph,
    active: frozenset[str] | None = None,
    watched: Iterable[fx.Node] = (),
    apart: bool = False,
) -> Plan:
    """Turn the training graph into a plan for a step in which the owners `active` train (None: all).

    The values of nodes in `watched` are in flight after the instruction that computes them, if one does.

    With `apart` the code is cut so that a compiler may take it for one operation: a random stream starts, and
    a leaf is made, only between segments; and a backward pass needs all of a segment or none, for it would
    yield zeros where there is no gradient.
    """
    found = replace(analyse(ir, active), watched=frozenset(watched))
    loss = ir.loss.name if ir.loss is not None and ir.loss in found.needed else None
    instructions = _Emitter(ir, found, apart).emit(order(ir, found, found.needed))
    inputs = tuple(n.name for n in (*ir.inputs, ir.target))
    release(instructions)
    runs = tuple(dict.fromkeys(i.owner for i in instructions_of(instructions)))
    specs = {n.name: n.meta.get("spec") for n in ir.graph.nodes}
    return Plan(instructions, found.trains, inputs, loss, runs, specs)


def every_plan(ir: TrainingGraph, phases: Iterable[Phase]) -> list[Plan]:
    """Return the plan of a step in which all train, and of each phase; those without an order have none."""
    plans = []
    for active in (None, *(frozenset(phase.trains) for phase in phases)):
        with suppress(GraphError):
            plans.append(lower(ir, active))
    return plans


class _Emitter:
    def __init__(self, ir: TrainingGraph, found: Analysis, apart: bool) -> None:
        self.ir, self.found, self.apart = ir, found, apart
        self.done: set[BackwardTask] = set()

    def emit(self, tasks: list[Task], inside: str | None = None) -> list[Instruction]:
        result: list[Instruction] = []
        pending: list[fx.Node] = []

        def flush() -> None:
            if pending:
                result.append(self._segment(pending))
                pending.clear()

        for task in tasks:
            if isinstance(task, fx.Node) and task.target is not ops.assign:
                if not self._computes(task):
                    continue
                if pending and self._parts(pending, task):
                    flush()
                pending.append(task)
                continue
            flush()
            if isinstance(task, BackwardTask):
                result.append(self._backward(task, inside))
            elif isinstance(task, UpdateTask):
                result.append(Update(task.owner))
            elif isinstance(task, fx.Node):
                state, value = argument(task, 0), argument(task, 1)
                result.append(Assign(str(task.meta["owner"]), str(state.target), value.name))
            else:
                result.append(self._loop(task))
        flush()
        return result

    def _computes(self, node: fx.Node) -> bool:
        """Whether a node is code; an owner's tensor is read where it is used, unless no code uses it."""
        if node.op == "get_attr":
            return any(
                is_lent(node, u) or self._hands_on(node, u) for u in node.users if u in self.found.needed
            )
        return node.op not in ("placeholder", "output") and node.target not in (ops.objective, ops.gradient)

    def _hands_on(self, state: fx.Node, user: fx.Node) -> bool:
        """Whether a state's value goes as it is into another one (a longer delay) or into a region."""
        assigned = user.target is ops.assign and user.args[1] is state
        return assigned or any(user is entry for r in self.ir.repeats.values() for entry, _ in r.carried)

    def _parts(self, pending: list[fx.Node], node: fx.Node) -> bool:
        """Whether a node begins a new segment after those that are pending."""
        last = pending[-1]
        if self._kind(last) != self._kind(node):
            return True
        return self.apart and (
            last in self.found.leaves
            or any((last in tape) != (node in tape) for tape in self.found.tapes.values())
            or (draws(self.ir.root, node) and any(draws(self.ir.root, n) for n in pending))
        )

    def _kind(self, node: fx.Node) -> tuple[str, bool, bool]:
        return str(node.meta["owner"]), node in self.found.taped, node.op == "get_attr"

    def _segment(self, nodes: list[fx.Node]) -> Segment:
        owner, taped, _ = self._kind(nodes[0])
        if not self.apart:
            return Segment(owner, taped, *compile_nodes(nodes, self.ir, self.found))
        leaves = tuple(n.name for n in nodes if n in self.found.leaves)
        return Segment(
            owner,
            taped,
            *compile_nodes(nodes, self.ir, replace(self.found, leaves=set())),
            draws=next((stream_of(n) for n in nodes if draws(self.ir.root, n)), None),
            leaves=leaves,
            computes=any(n.op != "get_attr" and n.target is not ops.stop_gradient for n in nodes),
        )

    def _backward(self, task: BackwardTask, inside: str | None) -> Backward:
        self.done.add(task)
        later = [t for b, t in self.found.tapes.items() if b.owner == task.owner and b not in self.done]
        shared = {n for n in self.found.tapes[task] if any(n in tape for tape in later)}
        if inside is not None:  # a tape from before the region serves every round
            shared |= {n for n in self.found.tapes[task] if n.meta.get("repeat") != inside}
        names = tuple(
            str(u.meta["objective"])
            for u in task.scalar.users
            if u.target is ops.objective and u in self.found.needed
        )
        gradients = tuple((g.name, argument(g, 1).name) for g in task.gradients)
        retain = any(
            n.op not in ("get_attr", "placeholder") and n.target is not ops.stop_gradient for n in shared
        )
        return Backward(task.owner, task.scalar.name, names, gradients, retain)

    def _loop(self, task: RegionTask) -> Loop:
        region = self.ir.repeats[task.name]
        scope = {n for n in self.found.needed if n.meta.get("repeat") == task.name}
        entries = {entry for entry, _ in region.carried}
        body = self.emit(order(self.ir, self.found, scope - entries, inside=task.name), task.name)
        carried = tuple((argument(entry, 0).name, entry.name, end.name) for entry, end in region.carried)
        made = {w for i in body for w in i.writes} | {entry for _, entry, _ in carried}
        reads = dict.fromkeys(
            [first for first, _, _ in carried] + [r for i in body for r in i.reads if r not in made]
        )
        leaving = {end for _, _, end in carried} | self._read_outside(scope)
        release(body, keep=leaving | set(reads) | {entry for _, entry, _ in carried})
        owner = min(
            (self.ir.owners[n.meta["owner"]] for n in scope), key=lambda o: (o.index, o.auxiliary)
        ).name
        writes = tuple(dict.fromkeys(w for i in body for w in i.writes if w in leaving))
        return Loop(owner, task.name, region.times, carried, body, tuple(reads), writes)

    def _read_outside(self, scope: set[fx.Node]) -> set[str]:
        return {n.name for n in scope if any(u in self.found.needed - scope for u in n.users)}
