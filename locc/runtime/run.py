"""The passes of a fit over its data: what happens in each, and between them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locc.callbacks import Callback, Fit
from locc.errors import LoccError
from locc.runtime import waves
from locc.runtime.checkpoint import save
from locc.runtime.evaluation import batch_of, evaluate
from locc.runtime.features import Keeping
from locc.runtime.history import Epoch
from locc.runtime.interrupts import Interrupts
from locc.runtime.program import Compiled
from locc.runtime.progress import Pass, Progress, RandomState, Rest
from locc.runtime.ranks import END, OVER, PASS


def random_of(program: Compiled, loader: Any) -> RandomState:
    """Return the random state from which a pass starts; that of rank 0, where there are several."""
    now = RandomState.now(loader, program.device)
    return now if program.ranks is None else program.ranks.told(now)


@dataclass
class Run:
    """One call of `fit`; `first` yields the batches of its first pass, where not the loader itself does."""

    state: Fit
    loader: Iterable[Any]
    first: Rest | None
    validation: Iterable[Any] | None
    callbacks: Sequence[Callback]
    stepwise: bool
    checkpoint: str | Path | None
    every: int | None
    interrupts: Interrupts
    keeping: Keeping | None
    shown: bool

    @property
    def program(self) -> Compiled:
        """What trains."""
        return self.state.program

    @property
    def progress(self) -> Progress:
        """Where the fit stands."""
        return self.state.progress

    @property
    def receives(self) -> bool:
        """Whether this rank reads no data: it trains, at its own pace, on what the one before it makes."""
        ranks = self.program.ranks
        return self.program.settings.replay is not None and ranks is not None and not ranks.leads

    def leave_if_asked(self) -> None:
        """Go the way of Ctrl-C where a callback has asked for the end; among ranks, where Ctrl-C came."""
        ranks = self.program.ranks
        if self.state.history.stopped is not None:
            raise KeyboardInterrupt
        if ranks is not None and ranks.leads and self.interrupts.noted:
            raise KeyboardInterrupt

    def together(self, word: str) -> None:
        """Come to the same point as the other ranks, where there are any."""
        ranks = self.program.ranks
        if ranks is not None and ranks.stages:
            ranks.follow(word, self.program.steps)

    def passes(self, left: list[Pass]) -> None:
        """Run the passes that are left, setting the program's phase for each."""
        program = self.program
        try:
            for number, one in enumerate(left):
                self.leave_if_asked()
                program.phase = one.phase.name if one.phase else None
                self._features(one, left[number + 1 :])
                self.together(PASS)
                self._pass(one)
            self.together(OVER)
        finally:
            program.features = None
            if self.keeping is not None:
                self.keeping.close()
            if program.settings.schedule != "sequential":
                program.phase = self.progress.outside

    def _features(self, one: Pass, later: list[Pass]) -> None:
        """Let a pass use the features of its stage, and keep those that a later pass will read."""
        if self.keeping is None or one.phase is None:
            return
        features = self.program.features = self.keeping.of(one.phase, self.program.plan(one.phase.name))
        if features is not None:
            features.begin(other.phase for other in later if other.phase is not None)

    def _pass(self, one: Pass) -> None:
        program, progress, started = self.program, self.progress, time.perf_counter()
        self.state.batches = length_of(self.loader) if one.steps is None else one.steps
        if progress.at != one.at:
            progress.at, progress.batches, progress.sums = one.at, 0, {}
        for callback in self.callbacks:
            callback.on_epoch_start(self.state)
        self._train(one)
        if progress.batches == 0 and not self.receives:
            raise LoccError(
                "the loader yielded no batch; a generator can be iterated only once, use a DataLoader or a "
                "list"
            )
        if program.ranks is not None:
            self.together(END)
            program.count()
        means = {name: float(value) / progress.batches for name, value in progress.sums.items()}
        program.built.executor.raise_deferred()
        seconds = time.perf_counter() - started
        reused = None if program.features is None else program.features.end()
        checked = None if self.validation is None else evaluate(program, self.validation)
        if self.shown:
            program.gather()
        with self.interrupts.waiting():
            if not self.stepwise and one.steps is None:
                _advance(program, means, _trained(program))
            loss = means.pop("loss", None)
            epoch = Epoch(one.at[1], program.phase, loss, means, seconds, checked, reused)
            self.state.history.epochs.append(epoch)
            program.epochs += 1
            if one.ends is not None:
                program.warm.add(one.ends)
            progress.turn(random_of(program, self.loader))
            for callback in self.callbacks:
                callback.on_epoch_end(self.state, epoch)
            if self.checkpoint is not None:
                save(program, self.checkpoint)

    def _train(self, one: Pass) -> None:
        """Train on the batches of the pass that are not done yet, or make the steps of one without data."""
        if self.receives:
            assert self.program.member is not None
            while self.program.member.awaits():
                self._steps([(None, None)], advance=self.stepwise and one.steps is None)
            return
        if one.steps is not None:
            self.progress.random.restore(self.loader, self.program.device)
            steps = one.steps - self.progress.batches
            left = Rest(itertools.repeat((None, one.made), steps))
        else:
            left = self._left()
        for wave in waves.alike(left, self.program.settings.wave or 1):
            batches = [batch_of(batch, self.program.settings.labels_within) for batch in wave]
            with self.interrupts.waiting():
                self._steps(batches, advance=self.stepwise and one.steps is None)
            self.leave_if_asked()

    def _left(self) -> Rest:
        """Return what yields the batches of the pass that are not done yet."""
        progress = self.progress
        if progress.source is not None and progress.source.batches is self.loader:
            return progress.source
        progress.random.restore(self.loader, self.program.device)
        rest, self.first = self.first or Rest(iter(self.loader)), None
        progress.source = rest if rest.batches is self.loader else None
        for number in range(progress.batches):
            if next(rest, None) is None:
                raise LoccError(
                    f"the loader yields {number} batches, and {progress.batches} were done when fit was cut; "
                    "give it an equal loader, or resume=False to start a new fit"
                )
        return rest

    def _steps(self, batches: list[tuple[Any, Any]], advance: bool) -> None:
        program, moved = self.program, [list[str]() for _ in batches]
        trained, before = _trained(program), program.steps
        if program.ranks is not None:
            trained = [owner for owner in trained if program.ranks.owns(owner)]

        def updated(number: int, owners: tuple[str, ...], objectives: Mapping[str, Tensor]) -> None:
            ready = [o for o in trained if o in owners and not program.built.learners[o].pending]
            moved[number] += ready
            if advance:
                _advance(program, objectives, ready)

        if program.settings.replay is not None:
            reports = [program.replay(*batches[0], updated)]
        elif program.settings.wave is None:
            reports = [program.step(*batches[0])]
            updated(0, tuple(trained), reports[0].objectives)
        else:
            reports = program.wave(batches, updated)
        for report, names in zip(reports, moved, strict=True):
            whole = {} if report.network_loss is None else {"loss": report.network_loss}
            self.progress.count({**whole, **report.objectives})
            for callback in self.callbacks:
                for name in names:
                    callback.on_update(self.state, name, report)
                callback.on_step_end(self.state, report)
        if self.every is not None and program.steps // self.every > before // self.every:
            assert self.checkpoint is not None
            save(program, self.checkpoint)


def _advance(program: Compiled, means: Mapping[str, Any], owners: Iterable[str]) -> None:
    """Advance the schedulers of some owners."""
    for name, scheduler in program.schedulers.items():
        if name not in owners:
            continue
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            # Each module watches its own objectives: the loss knows nothing of an early module.
            scheduler.step(sum(float(v) for key, v in means.items() if key.rpartition(".")[0] == name))
        else:
            scheduler.step()


def _trained(program: Compiled) -> list[str]:
    """Return the owners that train in the program's phase, in order."""
    trains = program.plan(program.phase).trains
    return [name for name in program.built.learners if name in trains]


def length_of(loader: Any) -> int | None:
    """Return how many batches a loader says that it has, if it does."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # a DataLoader over an iterable data set has a len that raises
        return None
