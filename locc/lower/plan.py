"""A step as a list of instructions: straight-line code per owner, backward passes, updates, releases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from locc.ir import ops
from locc.ir.graph import TrainingGraph
from locc.lower.tasks import Analysis, BackwardTask, RegionTask, Task, UpdateTask, analyse, order


@dataclass
class Segment:
    """Consecutive nodes of one owner, compiled to one function of the values that they read."""

    owner: str
    taped: bool
    function: Callable[..., tuple[Any, ...]]
    code: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    number: int
    frees: tuple[str, ...] = ()


@dataclass
class Backward:
    """The backward pass of one scalar; `gradients` maps a gradient's name to its leaf's."""

    owner: str
    scalar: str
    objectives: tuple[str, ...]
    gradients: tuple[tuple[str, str], ...]
    retain: bool
    frees: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that this reads."""
        return (self.scalar, *(leaf for _, leaf in self.gradients))

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the values that this creates."""
        return tuple(name for name, _ in self.gradients)


@dataclass
class Update:
    """One optimizer step of an owner."""

    owner: str
    frees: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass
class Loop:
    """A repeated region; `carried` holds (initial value, entry, exit)."""

    owner: str
    name: str
    times: int
    carried: tuple[tuple[str, str, str], ...]
    body: list[Instruction]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()


Instruction = Segment | Backward | Update | Loop


@dataclass
class Plan:
    """The instructions of one step, in which the owners `trains` train."""

    instructions: list[Instruction]
    trains: tuple[str, ...]
    inputs: tuple[str, ...]
    loss: str | None
    runs: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(_describe(i) for i in self.instructions)


def lower(ir: TrainingGraph, active: frozenset[str] | None = None) -> Plan:
    """Turn the training graph into a plan for a step in which the owners `active` train (None: all)."""
    found = analyse(ir, active)
    loss = ir.loss.name if ir.loss is not None and ir.loss in found.needed else None
    instructions = _Emitter(ir, found).emit(order(ir, found, found.needed), found.needed)
    inputs = tuple(n.name for n in (*ir.inputs, ir.target))
    _release(instructions, keep=set())
    runs = tuple(dict.fromkeys(i.owner for i in instructions))
    return Plan(instructions, found.trains, inputs, loss, runs)


class _Emitter:
    def __init__(self, ir: TrainingGraph, found: Analysis) -> None:
        self.ir, self.found = ir, found
        self.numbers: dict[str, int] = {}

    def emit(self, tasks: list[Task], scope: set[fx.Node]) -> list[Instruction]:
        result: list[Instruction] = []
        pending: list[fx.Node] = []

        def flush() -> None:
            if pending:
                result.append(self._segment(pending, scope))
                pending.clear()

        remaining = [t for t in tasks if isinstance(t, BackwardTask)]
        for task in tasks:
            if isinstance(task, fx.Node):
                if task.op in ("placeholder", "get_attr", "output") or task.target in (
                    ops.objective,
                    ops.gradient,
                ):
                    continue
                if pending and self._kind(pending[-1]) != self._kind(task):
                    flush()
                pending.append(task)
                continue
            flush()
            if isinstance(task, BackwardTask):
                remaining.remove(task)
                result.append(self._backward(task, remaining))
            elif isinstance(task, UpdateTask):
                result.append(Update(task.owner))
            else:
                result.append(self._loop(task))
        flush()
        return result

    def _kind(self, node: fx.Node) -> tuple[str, bool]:
        return str(node.meta["owner"]), node in self.found.taped

    def _segment(self, nodes: list[fx.Node], scope: set[fx.Node]) -> Segment:
        owner, taped = self._kind(nodes[0])
        code, function, reads, writes = compile_nodes(nodes, self.ir, self.found.leaves)
        number = self.numbers[owner] = self.numbers.get(owner, -1) + 1
        return Segment(owner, taped, function, code, reads, writes, number)

    def _backward(self, task: BackwardTask, remaining: list[BackwardTask]) -> Backward:
        tape = self.found.tapes[task]
        retain = any(self._shared(tape & self.found.tapes[other]) for other in remaining)
        names = tuple(
            str(u.meta["objective"])
            for u in task.scalar.users
            if u.target is ops.objective and u in self.found.needed
        )
        gradients = tuple((g.name, _argument(g, 1).name) for g in task.gradients)
        return Backward(task.owner, task.scalar.name, names, gradients, retain)

    @staticmethod
    def _shared(nodes: set[fx.Node]) -> bool:
        return any(
            n.op not in ("get_attr", "placeholder") and n.target is not ops.stop_gradient for n in nodes
        )

    def _loop(self, task: RegionTask) -> Loop:
        region = self.ir.repeats[task.name]
        scope = {n for n in self.found.needed if n.meta.get("repeat") == task.name}
        entries = {entry for entry, _ in region.carried}
        body = self.emit(order(self.ir, self.found, scope - entries, inside=task.name), scope)
        carried = tuple((_argument(entry, 0).name, entry.name, end.name) for entry, end in region.carried)
        made = {w for i in body for w in i.writes} | {entry for _, entry, _ in carried}
        reads = dict.fromkeys(
            [first for first, _, _ in carried] + [r for i in body for r in i.reads if r not in made]
        )
        leaving = {end for _, _, end in carried} | self._read_outside(scope)
        _release(body, keep=leaving | set(reads) | {entry for _, entry, _ in carried})
        owner = str(next(iter(scope)).meta["owner"])
        writes = tuple(dict.fromkeys(w for i in body for w in i.writes if w in leaving))
        return Loop(owner, task.name, region.times, carried, body, tuple(reads), writes)

    @staticmethod
    def _read_outside(scope: set[fx.Node]) -> set[str]:
        return {n.name for n in scope if any(u not in scope for u in n.users)}


def _argument(node: fx.Node, index: int) -> fx.Node:
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def compile_nodes(
    nodes: list[fx.Node], ir: TrainingGraph, leaves: set[fx.Node]
) -> tuple[str, Callable[..., tuple[Any, ...]], tuple[str, ...], tuple[str, ...]]:
    """Compile nodes to one Python function; returns code, function, names read and names written."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    reads: list[fx.Node] = []
    inside = set(nodes)
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr" and source not in reads:
                reads.append(source)
    for source in reads:
        copies[source] = graph.placeholder(source.name)
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = graph.get_attr(str(source.target))
        made = graph.node_copy(node, lambda n: copies[n])
        if node in leaves and node.target is ops.stop_gradient:
            made.target = leaf
        copies[node] = made
    kept = [n for n in nodes if _used_outside(n, inside, ir)]
    graph.output(tuple(copies[n] for n in kept))
    graph._codegen = fx.graph.CodeGen()
    source_code = graph.python_code("self")
    space: dict[str, Any] = dict(source_code.globals)
    exec(compile(source_code.src, f"<locc {nodes[0].meta['owner']}>", "exec"), space)
    function = _bind(space["forward"], ir)
    return source_code.src, function, tuple(n.name for n in reads), tuple(n.name for n in kept)


def _bind(forward: Callable[..., Any], ir: TrainingGraph) -> Callable[..., tuple[Any, ...]]:
    root = ir.root

    def run(*values: Any) -> tuple[Any, ...]:
        return tuple(forward(root, *values))

    return run


def leaf(x: torch.Tensor) -> torch.Tensor:
    """Return `x` without its tape, as a leaf that a gradient will be taken with respect to."""
    return x.detach().requires_grad_(True)


def _used_outside(node: fx.Node, inside: set[fx.Node], ir: TrainingGraph) -> bool:
    carried = any(end is node for region in ir.repeats.values() for _, end in region.carried)
    return carried or node is ir.loss or any(u not in inside for u in node.users)


def _release(instructions: list[Instruction], keep: set[str]) -> None:
    """Let every value go after the last instruction that reads it."""
    last: dict[str, Instruction] = {}
    for instruction in instructions:
        for name in (*instruction.writes, *instruction.reads):
            last[name] = instruction
    for name, instruction in last.items():
        if name not in keep:
            instruction.frees = (*instruction.frees, name)


def _describe(instruction: Instruction) -> str:
    frees = f"  free {', '.join(instruction.frees)}" if instruction.frees else ""
    if isinstance(instruction, Segment):
        kind = "forward" if instruction.taped else "forward (no tape)"
        return f"{instruction.owner}: {kind} -> {', '.join(instruction.writes)}{frees}"
    if isinstance(instruction, Backward):
        out = f" -> {', '.join(instruction.writes)}" if instruction.gradients else ""
        return f"{instruction.owner}: backward of {instruction.scalar}{out}{frees}"
    if isinstance(instruction, Update):
        return f"{instruction.owner}: update"
    inside = "\n".join("    " + line for i in instruction.body for line in _describe(i).splitlines())
    return f"{instruction.owner}: repeat '{instruction.name}' {instruction.times} times{frees}\n{inside}"
