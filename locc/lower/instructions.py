"""What a lowered step consists of: a list of instructions, each of one owner."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from locc.errors import LoccError
from locc.ir.spec import Spec


@dataclass
class Segment:
    """Consecutive nodes of one owner, compiled to one function.

    `function` takes what starts a random stream, by the name of the node that draws, and then the values
    that the segment reads. `text` is the code as a reader would write it, a line for each node.

    In a plan for a compiler, besides: `draws` names the one node that starts a random stream, if any does,
    `leaves` the values that become leaves once the function has returned, and `computes` says whether the
    function does more than hand on.
    """

    owner: str
    taped: bool
    function: Callable[..., tuple[Any, ...]]
    text: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    frees: tuple[str, ...] = ()
    draws: str | None = None
    leaves: tuple[str, ...] = ()
    computes: bool = False


@dataclass
class Backward:
    """The backward pass of one scalar; `gradients` maps a gradient's name to that of the value it is of."""

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
class Assign:
    """Sets the parameter or state of an owner at `path` to a value."""

    owner: str
    path: str
    value: str
    frees: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that this reads."""
        return (self.value,)


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


@dataclass
class Send:
    """Hands a value to the programs of the owners `to`, without its tape."""

    owner: str
    value: str
    to: tuple[str, ...]
    spec: Spec
    frees: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that this reads."""
        return (self.value,)


@dataclass
class Receive:
    """Waits for a value of the owner `source`; `owner` is one that reads it."""

    owner: str
    value: str
    source: str
    spec: Spec
    frees: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the values that this creates."""
        return (self.value,)


Instruction = Segment | Backward | Update | Assign | Loop | Send | Receive


def unknown(instruction: object) -> LoccError:
    """Return the error for what is no instruction."""
    known = ", ".join(kind.__name__ for kind in get_args(Instruction))
    return LoccError(
        f"the plan holds a {type(instruction).__name__}, which is no instruction; known: {known}"
    )


@dataclass
class Plan:
    """The instructions of one step, in which the owners `trains` train.

    Attributes:
        instructions: in the order in which they run.
        trains: the owners that update.
        inputs: the names of the batch's values, the target last.
        loss: the name of the user's loss, where the step computes it.
        runs: the owners that have an instruction.
        specs: shape and dtype of each value.
    """

    instructions: list[Instruction]
    trains: tuple[str, ...]
    inputs: tuple[str, ...]
    loss: str | None
    runs: tuple[str, ...] = ()
    specs: Mapping[str, Spec] = field(default_factory=dict)

    @cached_property
    def read(self) -> frozenset[str]:
        """The values of the batch that some instruction reads; a step holds no others."""
        return frozenset(self.inputs) & {name for i in self.instructions for name in i.reads}

    def bind(self, values: Iterable[Any]) -> dict[str, Any]:
        """Return the values of the batch by name, those that are read."""
        return {n: v for n, v in zip(self.inputs, values, strict=True) if n in self.read}

    def __str__(self) -> str:
        return "\n".join(_describe(i) for i in self.instructions)


def release(instructions: Iterable[Instruction], keep: Collection[str] = ()) -> None:
    """Let every value go after the last instruction that reads it."""
    last: dict[str, Instruction] = {}
    for instruction in instructions:
        instruction.frees = ()
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
    if isinstance(instruction, Assign):
        return f"{instruction.owner}: set {instruction.path} to {instruction.value}{frees}"
    if isinstance(instruction, Send):
        return f"{instruction.owner}: send {instruction.value} to {', '.join(instruction.to)}{frees}"
    if isinstance(instruction, Receive):
        return f"{instruction.owner}: receive {instruction.value} from {instruction.source}{frees}"
    if not isinstance(instruction, Loop):
        raise unknown(instruction)
    inside = "\n".join("    " + line for i in instruction.body for line in _describe(i).splitlines())
    return f"{instruction.owner}: repeat '{instruction.name}' {instruction.times} times{frees}\n{inside}"


def instructions_of(instructions: Iterable[Instruction]) -> Iterator[Instruction]:
    """Yield the instructions, those inside of repeated regions included."""
    for instruction in instructions:
        yield instruction
        if isinstance(instruction, Loop):
            yield from instructions_of(instruction.body)
