"""An owner's stretch of a step as one recording, which the device runs again without Python.

What a recording is made of is a `Recorder`'s: `CudaGraphs` on a GPU. All else here is the same for any: what
is recorded, when a recording serves, and why there is none.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from locc.errors import LoccError, RunError
from locc.ir import TrainingGraph
from locc.ir.view import node_modules
from locc.lower import (
    Backward,
    Instruction,
    Plan,
    Receive,
    Segment,
    Send,
    Update,
    instructions_of,
)
from locc.runtime.compiled import Piece
from locc.runtime.learner import Learner
from locc.runtime.offload import slots

MOST = 16
"""Of so many kinds of steps (shapes of batches, learning rates) an owner's recordings are kept."""

_log = logging.getLogger("locc")

NEVER_ALIKE = (
    "no two of its steps so far were alike in the shapes of what it reads, its optimizer's settings, its "
    "modes and the places of its tensors"
)

Start = Callable[[int], None]
"""Starts the random stream of a number, in what is recorded."""


class Recording(Protocol):
    """What a device does again."""

    def replay(self, seeds: Sequence[int]) -> None:
        """Do it again, with random streams that start from these seeds."""


class Recorder(Protocol):
    """Makes recordings."""

    def record(self, run: Callable[[Start], None], streams: int) -> Recording:
        """Record what `run` asks of the device, of which nothing happens yet.

        Args:
            run: is called once. The tensors that it reads and makes are those of every replay.
            streams: how many random streams it starts.

        Raises:
            Exception: what `run` raises; or it asks for what cannot be recorded, such as to wait for a value.
        """


def recorder_for(device: torch.device) -> Recorder:
    """Return what records on a device.

    Raises:
        LoccError: it has no CUDA graphs.
    """
    if device.type != "cuda":
        raise LoccError(
            f"backend='cudagraphs' runs a module's step as one CUDA graph, and the model is on {device}; "
            "move it to a GPU before compiling it (model.cuda()), or use backend='eager' or 'inductor'"
        )
    return CudaGraphs(device)


class CudaGraphs:
    """Records CUDA graphs, which share their memory: what one of them has finished with serves the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[Start], None], streams: int) -> _CudaRecording:
        """Record what `run` asks of the device."""
        graph = torch.cuda.CUDAGraph()
        default = torch.cuda.default_generators[self.device.index or 0]
        # A generator's seed is fixed while it is recorded from: each stream is a generator, in whose place
        # the default one draws. What it was before takes no part, so that a failure cannot harm it.
        generators = [torch.Generator(self.device) for _ in range(streams)]
        for generator in generators:
            graph.register_generator_state(generator)
        own, stream = default.graphsafe_get_state(), torch.cuda.current_stream(self.device)
        default.graphsafe_set_state(torch.Generator(self.device))
        first: list[Exception] = []

        def start(number: int) -> None:
            default.graphsafe_set_state(generators[number])

        def running() -> None:
            try:
                run(start)
            except Exception as error:
                first.append(error)
                raise

        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                running()
        except Exception as error:
            # PyTorch stays on the stream of a recording that has failed, and takes memory from its pool.
            torch.cuda.set_stream(stream)
            with contextlib.suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.device.index or 0, self.pool)
            self.pool = torch.cuda.graph_pool_handle()
            raise (first or [error])[0] from None
        finally:
            default.graphsafe_set_state(own)
        return _CudaRecording(graph, generators)


@dataclass
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    generators: list[torch.Generator]

    def replay(self, seeds: Sequence[int]) -> None:
        """Launch the graph."""
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(seed)
        self.graph.replay()


@dataclass
class Kept:
    """A recording of a turn, and the tensors through which it reads and writes."""

    recording: Recording
    inputs: list[Tensor]
    streams: tuple[tuple[str, int], ...]
    outputs: dict[str, Any]
    objectives: dict[str, Tensor]
    loss: Tensor | None
    flags: list[tuple[str, Tensor]]
    moved: list[str]


@dataclass
class Turn:
    """Consecutive instructions of one owner.

    Attributes:
        reads: the values that come from outside.
        leaves: those that it makes and leaves.
        frees: those from outside that nothing reads afterwards.
        reason: why it is not recorded.
        met: the random streams of each kind of step that has run eagerly.
        kept: the recording of each kind of step.
    """

    owner: str
    instructions: list[Instruction]
    reads: tuple[str, ...]
    leaves: tuple[str, ...]
    frees: tuple[str, ...]
    reason: str | None = None
    met: dict[Hashable, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    kept: dict[Hashable, Kept] = field(default_factory=dict)

    @property
    def piece(self) -> Piece:
        """What it is in a report."""
        inside = instructions_of(self.instructions)
        text = tuple(line for i in inside if isinstance(i, Segment) for line in i.text)
        return Piece(self.owner, text, self.reason or (None if self.kept else NEVER_ALIKE))

    def has(self, kind: type) -> bool:
        """Whether it has an instruction of a kind."""
        return any(isinstance(i, kind) for i in instructions_of(self.instructions))


@dataclass
class Graphs:
    """What of a program has been recorded."""

    ir: TrainingGraph
    recorder: Recorder
    strict: bool = False
    plans: dict[int, tuple[Plan, list[Turn | Instruction]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        root, owners = self.ir.root, list(self.ir.owners)
        self._slots = slots(self.ir)
        self._modules: dict[str, list[nn.Module]] = {
            owner: list(dict.fromkeys(m for n in self.ir.nodes(owner) for m in node_modules(root, n)))
            for owner in owners
        }
        self._told: set[tuple[str, str | None]] = set()
        self._hooked = {o for o in owners if any(hasattr(n.target, "hook") for n in self.ir.nodes(o))}

    def turns(self, plan: Plan) -> list[Turn | Instruction]:
        """Return the instructions of a plan as turns, and those of which no turn is made."""
        if id(plan) not in self.plans:
            self.plans[id(plan)] = plan, _turns(plan)  # with the plan, so that its id stays its own
        return self.plans[id(plan)][1]

    def unknown(self, plan: Plan) -> bool:
        """Whether a step of a plan has a turn of which is not known yet whether it can be recorded."""
        return any(isinstance(t, Turn) and not t.kept and t.reason is None for t in self.turns(plan))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The turns of all plans that have run."""
        return tuple(t.piece for _, turns in self.plans.values() for t in turns if isinstance(t, Turn))

    def obstacle(self, turn: Turn, learner: Learner | None) -> str | None:
        """Return why a turn cannot be recorded as things are now."""
        modules = self._modules[turn.owner]
        hooked = any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in modules
        )
        tensors = [table.get(name) for table, name in self._slots[turn.owner]]
        hooked = hooked or any(
            t is not None and (t._backward_hooks or t._post_accumulate_grad_hooks) for t in tensors
        )
        if hooked or turn.owner in self._hooked:
            return "it has hooks, which would not be called"
        if learner is None or not turn.has(Update):
            return None
        if learner.draws:
            return "its optimizer has hooks, or is none of PyTorch's own"
        if not learner.gated:
            return (
                f"its optimizer, {type(learner.optimizer).__name__}, waits for the device; Adam, AdamW and "
                "SGD with fused=True do not"
            )
        return None

    def kind(self, turn: Turn, values: Mapping[str, Any], learner: Learner | None) -> Hashable:
        """Return what is equal for steps that one recording serves."""
        held: list[Any] = [table.get(name) for table, name in self._slots[turn.owner]]
        settings: list[Any] = []
        device = "cpu"
        if learner is not None:
            state, device = learner.optimizer.state, learner.parameters[0].device.type
            held += [v for p in learner.parameters if p in state for v in state[p].values()]
            for group in learner.optimizer.param_groups:
                settings += [(k, _place(v)) for k, v in group.items() if k != "params"]
        found = (
            tuple(map(_shape, tree_leaves([values[name] for name in turn.reads]))),
            tuple(map(_place, held)),
            tuple(settings),
            tuple([m.training for m in self._modules[turn.owner]]),
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        )
        try:
            hash(found)
        except TypeError:
            return repr(found)
        return found

    def meet(self, turn: Turn, kind: Hashable, streams: tuple[tuple[str, int], ...]) -> None:
        """Note that a kind of step has run, with these random streams."""
        turn.met[kind] = streams
        if len(turn.met) > MOST:
            turn.met.pop(next(iter(turn.met)))

    def tell(self, turn: Turn, cause: Exception | None = None) -> None:
        """Log, once, why a turn is not recorded.

        Raises:
            RunError: that is asked for (`strict`).
        """
        if self.strict:
            raise RunError(
                f"module '{turn.owner}' cannot be recorded: {turn.reason}. Leave out strict=True, and it "
                "runs eagerly; or change what the reason names"
            ) from cause
        if (turn.owner, turn.reason) not in self._told:
            self._told.add((turn.owner, turn.reason))
            _log.warning("locc: module '%s' runs eagerly: %s", turn.owner, turn.reason)

    @staticmethod
    def why(error: Exception) -> str:
        """Return what an error of recording says, in a line."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines[0] if lines else type(error).__name__).rstrip(".")

    def keep(self, turn: Turn, kind: Hashable, kept: Kept) -> None:
        """Keep a recording; the oldest goes where there are too many."""
        turn.kept[kind] = kept
        if len(turn.kept) > MOST:
            turn.kept.pop(next(iter(turn.kept)))


class HostRandom:
    """Notices draws from random streams that are not the device's."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.moved = device, False
        self._seen = self._now()

    def look(self) -> None:
        """Note whether anything has been drawn since the last time."""
        self.moved = self.moved or self._now() != self._seen

    def begin(self) -> None:
        """Take the state of now as the one to compare with."""
        self._seen = self._now()

    def _now(self) -> tuple[Any, ...]:
        numpy = sys.modules.get("numpy")
        drawn = None if numpy is None else repr(numpy.random.get_state()[1:3])
        own = None if self.device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
        return random.getstate(), drawn, own


@contextmanager
def recordable(learner: Learner | None) -> Iterator[None]:
    """Say of an optimizer, for PyTorch asks, that its step may be recorded, which is so where it is fused."""
    groups = [] if learner is None else [g for g in learner.optimizer.param_groups if "capturable" in g]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, own in zip(groups, before, strict=True):
            group["capturable"] = own


def _shape(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _place(value: Any) -> Any:
    return (value.data_ptr(), value.requires_grad) if isinstance(value, Tensor) else value


def _turns(plan: Plan) -> list[Turn | Instruction]:
    stretches: list[list[Instruction]] = []
    for instruction in plan.instructions:
        last = stretches[-1][-1] if stretches else None
        alone = isinstance(instruction, (Send, Receive)) or isinstance(last, (Send, Receive))
        if last is None or alone or last.owner != instruction.owner:
            stretches.append([])
        stretches[-1].append(instruction)
    found: list[Turn | Instruction] = []
    for stretch in stretches:
        found.append(stretch[0] if isinstance(stretch[0], (Send, Receive)) else _turn(stretch))
    turns = [turn for turn in found if isinstance(turn, Turn)]
    for turn in turns:
        turn.reason = _apart(turn, [other for other in turns if other.owner == turn.owner])
    return found


def _turn(stretch: list[Instruction]) -> Turn:
    made, reads, freed = dict[str, None](), dict[str, None](), set[str]()
    for instruction in stretch:
        reads.update(dict.fromkeys(name for name in instruction.reads if name not in made))
        made.update(dict.fromkeys(instruction.writes))
        freed.update(instruction.frees)
    leaves = tuple(name for name in made if name not in freed)
    return Turn(stretch[0].owner, stretch, tuple(reads), leaves, tuple(freed - made.keys()))


def _apart(turn: Turn, own: list[Turn]) -> str | None:
    """Say what a turn shares with others that a recording would not: a tape, gradients."""
    inside = list(instructions_of(turn.instructions))
    if any(i.owner != turn.owner or isinstance(i, (Send, Receive)) for i in inside):
        return "a repeated region is of several modules"
    taped = [
        t for t in own if any(isinstance(i, Segment) and i.taped for i in instructions_of(t.instructions))
    ]
    back = [t for t in own if t.has(Backward)]
    if (turn in taped or turn in back) and any(one is not other for one in taped for other in back):
        return "other modules run between its forward and its backward pass"
    updating = [t for t in own if t.has(Update)]
    if (turn in back or turn in updating) and any(one is not other for one in back for other in updating):
        return "other modules run between its backward pass and its update"
    return None
