"""A program shared out among processes: which modules are whose, and a step that stays one."""

from __future__ import annotations

import atexit
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from locc.errors import RunError
from locc.ir import TrainingGraph
from locc.lower import Plan, Receive, Send, project
from locc.lower.inference import Inference
from locc.runtime.executor import Executor
from locc.runtime.ranks.group import FOREVER, Group
from locc.runtime.ranks.links import Links
from locc.runtime.ranks.placement import Cost, shared_out
from locc.runtime.replicas import Replicas

DEPTH = 2
"""Steps that a rank may be ahead of one that reads from it."""
PEEK = 1 << 16
"""Bytes of each tensor of a batch by which ranks compare what they have read."""

BATCH, PASS, END, OVER, STOP = "a batch", "a pass", "the end of a pass", "the end of the fit", "stop"
TRIED, JUDGED = "a batch to evaluate", "the end of an evaluation"
"""What rank 0 tells the others to do next."""


@dataclass
class Ranks(Group):
    """This process among those that train a program, with `schedule="pipelined"`.

    Attributes:
        homes: the stage of each owner.
        replicas: the ranks of this one's stage, where there are several.
        stale: whether the modules of other ranks have trained since `Compiled.gather`; what they hold has
            no memory here.
        guards: keep the user from what is away.
        path: the inference path, once modules are shared out.
        trial: what this rank runs of it.
    """

    homes: dict[str, int] = field(default_factory=dict)
    replicas: Replicas | None = None
    stale: bool = False
    guards: list[RemovableHandle] = field(default_factory=list)
    path: Inference | None = None
    trial: Plan | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._wires = dist.new_group(backend="gloo", timeout=FOREVER)
        self._clock = 0  # the next batch's number, counting those that are evaluated

    @classmethod
    def join(cls, timeout: float, width: int, check: Callable[[int], None]) -> Ranks | None:
        """Return this process's place among those of torch.distributed; None where it is alone.

        Joins the process group that `torchrun` describes in the environment, if nobody has yet. `check` looks
        at the number of processes first: who left while others connect would be taken for dead by them.
        """
        if not several():
            return None
        if not dist.is_initialized():
            _init()
            atexit.register(dist.destroy_process_group)
        check(dist.get_world_size())
        return cls(dist.get_rank(), dist.get_world_size(), timeout, width)

    @property
    def stage(self) -> int:
        """The number of this rank's stage."""
        return self.rank // self.width

    @property
    def column(self) -> int:
        """Which share of every batch this rank runs."""
        return self.rank % self.width

    @property
    def names(self) -> list[str]:
        """The modules that this rank runs, once they are shared out."""
        return self.stages[self.stage]

    def owns(self, owner: str) -> bool:
        """Whether this rank trains an owner."""
        return not self.homes or self.homes[owner] == self.stage

    def answers(self, owner: str) -> bool:
        """Whether this rank is the first of those that train an owner; before they are shared out, rank 0."""
        return self.first(owner) == self.rank

    def first(self, owner: str) -> int:
        """Return the first rank of those that train an owner; 0 for what has none."""
        return self.homes.get(owner, 0) * self.width

    # ---- placement ------------------------------------------------------------------------------

    def place(
        self, ir: TrainingGraph, path: Inference, stages: list[list[str]], device: torch.device
    ) -> None:
        """Give each rank its modules, with their auxiliaries, and open the links between ranks.

        Args:
            ir: what trains.
            path: the inference path.
            stages: the modules of each stage.
            device: where what is received goes.
        """
        of = {module.name: module.index for module in ir.modules}
        stage_of = {of[name]: stage for stage, names in enumerate(stages) for name in names}
        self.stages = stages
        self.homes = {owner.name: stage_of[owner.index] for owner in ir.owners.values()}
        self.path, plan = path, path.plan
        self.trial = project(plan, self.owners)
        makers = {name: i.owner for i in plan.instructions for name in i.writes}
        flows = [(makers.get(name, ""), i.owner) for i in plan.instructions for name in i.reads]
        flows += [
            (str(source.meta.get("owner")), str(node.meta.get("owner")))
            for node in ir.graph.nodes
            for source in node.all_input_nodes
        ]
        pairs = {(0, rank) for rank in range(1, self.size)}
        for start, end in {(self.homes.get(a), self.homes.get(b)) for a, b in flows}:
            if start is not None and end is not None and start != end:
                pairs |= {(self._rank(start, c), self._rank(end, c)) for c in range(self.width)}
        self._links = Links(
            self._wires,
            [a for a, b in sorted(pairs) if b == self.rank],
            [b for a, b in sorted(pairs) if a == self.rank],
            DEPTH,
            device,
        )
        atexit.register(self._close)

    def _rank(self, stage: int, column: int) -> int:
        return stage * self.width + column

    def replicate(self, buffers: Sequence[Tensor]) -> None:
        """Open the connections inside of each stage; every rank calls it with the buffers of its modules."""
        for stage in range(len(self.stages)):
            ranks = [self._global(self._rank(stage, column)) for column in range(self.width)]
            group = dist.new_group(ranks, timeout=FOREVER, backend="gloo")
            if stage == self.stage:
                self.replicas = Replicas(group, self.column, self.width, buffers, self._among)

    def _among(self, wait: Callable[[Callable[[], None]], None]) -> None:
        """Wait for the other ranks of the stage."""
        beside = [self._rank(self.stage, c) for c in range(self.width) if c != self.column]
        look = self.idle("its share of a mean")
        who = self._named(beside[0]) if len(beside) == 1 else f"one of the ranks {beside}"
        self._call(lambda: wait(lambda: look(beside[0])), f"{who} is gone at step {self.at}")

    @property
    def owners(self) -> tuple[str, ...]:
        """What this rank runs."""
        return tuple(name for name in self.homes if self.owns(name))

    def shared_out(self, costs: Callable[[], Mapping[str, Cost]]) -> list[list[str]]:
        """Return the modules of each stage, by what they cost on rank 0; every rank calls it.

        Raises:
            RunError: rank 0 could not say.
        """
        chosen = None
        if self.leads:
            with self.failing():
                seconds = {name: cost.seconds for name, cost in costs().items()}
                chosen = shared_out(seconds, self.size // self.width)
        found: list[list[str]] = self.told(chosen)
        return found

    # ---- a step ---------------------------------------------------------------------------------

    def run(
        self, executor: Executor, ir: TrainingGraph, plan: Plan, values: Sequence[Any], step: int
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Run what this rank has of a step, on a batch of which every rank has to hold the same.

        Replicas take their share of it; objectives and loss are those of the whole.

        Raises:
            RunError: they do not, or another rank has stopped; or see `Executor.run`.
            KeyboardInterrupt: rank 0 says so.
        """
        self.begin(step, values)
        with self.failing():
            if self.replicas is None:
                return executor.run(plan, values, step, self)
            found = executor.run(plan, self.replicas.part(ir, values, step), step, self)
            self.replicas.settle()
            return found

    def begin(self, step: int, batch: Sequence[Any], word: str = BATCH) -> None:
        """Start a step on a batch, or its evaluation, of which every rank has to hold the same.

        Raises:
            RunError: they do not, or another rank has stopped.
            KeyboardInterrupt: rank 0 says so.
        """
        self.at = step
        self._opened().begin(self._clock, self.idle("room for what it sends"))
        self.follow(word, step, _digest(batch))
        self._clock += 1

    def check_whole(self, *_: Any) -> None:
        """Refuse to go on where other ranks hold newer parameters than this one.

        Raises:
            RunError: they do.
        """
        if self.stale:
            raise RunError(
                "other ranks have trained their modules since this one has seen them; call program.gather() "
                "on every rank first"
            )

    def evaluate(self, executor: Executor, values: Sequence[Any], step: int) -> Tensor | None:
        """Run what this rank has of the inference path; return what the last module makes of the output.

        Raises:
            RunError: see `run`.
            KeyboardInterrupt: rank 0 says so.
        """
        self.begin(step, values, TRIED)
        assert self.trial is not None
        with self.failing():
            return executor.run(self.trial, values, step, self)[1]

    def follow(self, word: str, step: int, digest: int = 0) -> None:
        """Rank 0 tells the others what comes next; these check that it is what they are about to do.

        Raises:
            RunError: it is not.
            KeyboardInterrupt: rank 0 stops.
        """
        links = self._opened()
        self.at = step
        links.at(self._clock)
        if self.leads:
            for rank in range(1, self.size):
                links.send(rank, "", (word, digest))
            return
        said, seen = links.receive(0, "", self.idle("rank 0's next batch"))
        if said == STOP:
            raise KeyboardInterrupt
        if said != word:
            raise RunError(
                f"rank 0 goes on to {said}, and rank {self.rank} to {word}, after {step} steps: their "
                "loaders yield different numbers of batches, or their scripts differ"
            )
        if seen != digest:
            raise RunError(
                f"rank 0 and rank {self.rank} have read different batches for step {step}: every rank "
                "iterates over the whole data, in the same order; leave out a DistributedSampler, and seed "
                "what shuffles alike"
            )

    def called(self) -> bool:
        """Whether rank 0 has said what comes next."""
        links = self._opened()
        links.at(self._clock)
        return links.has_arrived(0, "")

    def send(self, instruction: Send, value: Any) -> None:
        """Hand a value to the ranks that read it; returns at once."""
        for stage in dict.fromkeys(self.homes[owner] for owner in instruction.to):
            self._opened().send(self._rank(stage, self.column), instruction.value, value)

    def receive(self, instruction: Receive) -> Any:
        """Wait for a value of another rank.

        Raises:
            RunError: a rank has stopped, or says nothing for too long.
        """
        source = self._rank(self.homes[instruction.source], self.column)
        return self._opened().receive(source, instruction.value, self.idle(f"'{instruction.value}'"))


def several() -> bool:
    """Whether this process is one of several, known to torch.distributed or started by `torchrun`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _init() -> None:
    """Join the others that torchrun has started.

    Where it starts them again it may keep the store, in which the processes of before have left addresses.
    """
    store, rank, size = next(rendezvous("env://"))
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group("gloo", store=PrefixStore(f"start {again}", store), rank=rank, world_size=size)


def _digest(batch: Sequence[Any]) -> int:
    """Return a number that tells batches apart: of shapes, and of the first bytes of each tensor."""
    found = 0
    for leaf in tree_leaves(list(batch)):
        text = repr(leaf) if isinstance(leaf, (int, float, str, type(None))) else type(leaf).__name__
        if isinstance(leaf, Tensor):
            text = f"{leaf.dtype} {tuple(leaf.shape)}"
            some = leaf.detach().reshape(-1)[: PEEK // max(1, leaf.element_size())].cpu().contiguous()
            found = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), found)
        found = zlib.crc32(text.encode(), found)
    return found
