"""A program as one of the ranks that train it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from locc import files
from locc.errors import LoccError
from locc.ir import Inputs, TrainingGraph
from locc.lower import ModuleProgram, Plan, program_of
from locc.runtime import ranks, waves
from locc.runtime.built import Built
from locc.runtime.progress import Progress
from locc.runtime.replay import Workers
from locc.runtime.report import StepReport
from locc.runtime.settings import TIMEOUT, Settings

_OWN = ("params", "fused", "foreach", "capturable")
"""What a rank may have otherwise in its optimizers' groups: how they compute, on its device."""


class _Program(Protocol):
    """What a member needs of the program, which is `locc.Program`."""

    steps: int
    phase: str | None
    progress: Progress | None
    settings: Settings

    @property
    def built(self) -> Built: ...
    @property
    def ir(self) -> TrainingGraph: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    def plan(self, phase: str | None) -> Plan: ...
    def costs(self, plan: Plan, values: list[Any]) -> dict[str, ranks.Cost]: ...
    def bind(self, x: Any, y: Any = None) -> list[Any]: ...
    def moved(self, value: Any) -> Any: ...
    def in_phase(self) -> AbstractContextManager[None]: ...
    def workers(self, phase: str | None) -> Workers: ...


def _facts(program: _Program) -> dict[str, Any]:
    """Return what trains another network where a rank has it otherwise, beside the graph."""
    settings = program.settings
    facts: dict[str, Any] = {"steps done": program.steps, "autocast=": settings.dtype}
    names = ("schedule", "replicas", "stages", "accumulate", "clip", "replay")
    facts |= {f"{name}=": getattr(settings, name) for name in names}
    for owner, learner in program.built.learners.items():
        facts[f"the optimizer of '{owner}'"] = type(learner.optimizer).__name__
        for group in learner.optimizer.param_groups:
            facts |= {f"{k} of the optimizer of '{owner}'": v for k, v in group.items() if k not in _OWN}
    kinds = {owner: type(one).__name__ for owner, one in program.built.schedulers.items()}
    return facts | {"scheduler=": kinds}


class Member:
    """Runs a program's modules that are this rank's.

    Attributes:
        ranks: this rank, and what it knows of the others.
        pace: what has been received and waits for its turn, in schedule "replay".
    """

    def __init__(self, program: _Program, own: ranks.Ranks) -> None:
        self._program, self.ranks = program, own
        self.pace: ranks.Pace | None = None
        if program.settings.offload is not None:
            own.away = ranks.Away(program.settings.offload)

    @classmethod
    def joined(cls, program: _Program) -> Member | None:
        """Become one of the ranks that train a program, if there are others.

        Raises:
            LoccError: the program and the processes do not go together.
        """
        settings, executor = program.settings, program.built.executor
        replicas = settings.replicas or 1

        def check(size: int) -> None:
            if settings.visits:
                raise LoccError(
                    f"offload='cpu' is for training in one process, and {size} were started; leave it out, "
                    "or start one"
                )
            if settings.replay is not None and not settings.replay.buffer:
                raise LoccError(
                    f"buffer=0 trains in lock-step, and {size} processes were started; give a buffer, or use "
                    "schedule='pipelined'"
                )
            ranks.check_size(program.ir, size, replicas, settings.stages)

        own, executor.seed = ranks.join(
            program.ir, settings.timeout or TIMEOUT, replicas, _facts(program), executor.seed, check
        )
        return None if own is None else cls(program, own)

    def take_place(self, values: list[Any]) -> None:
        """Share out the modules, if that has not been done, and let go of those of other ranks."""
        own, program = self.ranks, self._program
        placed = not own.stages
        if placed:
            chosen = program.settings.stages
            stages = chosen or own.shared_out(lambda: program.costs(program.plan(program.phase), values))
            ranks.place(own, program.ir, stages, program.device)
            ranks.forget(own, program.built.learners)
            program.built.executor.replicas = own.replicas
            program.built.states = [state for state in program.built.states if own.owns(state.owner)]
            if program.settings.replay is not None:
                self.pace = ranks.Pace(own, program.settings.replay.buffer, program.device)
        if not own.stale and len(own.stages) > 1:
            ranks.leave(own, program.ir)
            own.stale = True
        if placed and program.settings.offload is None:  # in files while compiling, perhaps
            every = (*program.ir.root.parameters(), *program.ir.root.buffers())
            files.fetch(tensor for tensor in every if tensor not in own.away)

    def step(self, plan: Plan, values: list[Any]) -> StepReport:
        """Run this rank's modules on a batch."""
        self.take_place(values)
        program, built = self._program, self._program.built
        if program.phase not in built.shares:
            built.shares[program.phase] = program_of(program.ir, plan, self.ranks.owners).plan
        share = built.shares[program.phase]
        objectives, loss = self.ranks.run(built.executor, program.ir, share, values, program.steps)
        program.steps += 1
        return StepReport(objectives, loss, self._elsewhere())

    def paced(self, batch: tuple[Any, Any], updated: waves.Updated) -> StepReport:
        """Let rank 0 train on a batch, any other rank on one that it has received, when there is one."""
        own, program = self.ranks, self._program
        values = program.bind(*batch) if own.leads else []
        with own.failing(), program.in_phase():
            self.take_place(values)
            workers = program.workers(program.phase)
            if own.leads:
                found = workers.run(program.built.executor, values, updated)
                program.steps += 1
            elif workers.ready() or self.awaits():
                found = workers.turn(program.built.executor, updated)
            else:
                found = workers.last
        return StepReport(*found, self._elsewhere())

    def awaits(self) -> bool:
        """Wait until this rank, which is not the first, has something to train on in schedule "replay".

        Returns:
            False where rank 0 has ended the pass.

        Raises:
            RunError: there is nothing, and another rank has stopped, or is silent for too long.
        """
        self.take_place([])
        assert self.pace is not None
        return self.pace.awaits(self._program.workers(self._program.phase), self._program.phase)

    def employ(self, workers: Workers, parts: list[ModuleProgram], phase: str | None) -> None:
        """Have workers of a phase train the modules that are this rank's, and hand on to the next rank."""
        if self.pace is not None:
            mine = [i for i, part in enumerate(parts) if part.name in self.ranks.names]
            workers.own = range(mine[0], mine[-1] + 1)
            workers.hand = partial(self.pace.hand, phase)

    def gather(self) -> None:
        """Bring what the other ranks have trained into this process; every rank calls it."""
        if self.ranks.stages:
            ranks.gather(self.ranks, self._program.ir)
            self.count()

    def count(self) -> None:
        """Bring the sums of the other ranks' objectives in the pass under way; every rank calls it."""
        program = self._program
        if self.ranks.stages and program.progress is not None:
            loss_here = self.ranks.owns(program.ir.last.name)
            program.steps = ranks.count(
                self.ranks, program.progress, program.steps, loss_here, program.device
            )

    def tried(self, x: Any, y: Any) -> Tensor | None:
        """Evaluate a batch among the ranks, all of which call it; see `locc.losses.judged`.

        Returns:
            What is known on those ranks that run the last module.
        """
        program = self._program
        values = program.ir.captured.signature.bind(Inputs.of(program.model, program.moved(x)))
        plainly = replace(program.built.executor, backend="eager", autocast=None, replicas=None, recompute=())
        return self.ranks.evaluate(plainly, [*values, program.moved(y)], program.steps)

    def _elsewhere(self) -> str:
        runs = ", ".join(f"'{name}'" for name in self.ranks.names)
        return f"it is of all modules, and rank {self.ranks.rank} runs only {runs}"
