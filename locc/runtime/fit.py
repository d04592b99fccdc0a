"""The training loop."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locc.callbacks import Callback, Fit, ProgressBar
from locc.errors import CheckpointError, LoccError
from locc.facts.traffic import couplings
from locc.runtime import waves
from locc.runtime.checkpoint import exists, load, save
from locc.runtime.evaluation import batch_of, evaluate
from locc.runtime.features import Keeping, Storage
from locc.runtime.history import Epoch, History
from locc.runtime.interrupts import Interrupts
from locc.runtime.program import FEW, Compiled
from locc.runtime.progress import Pass, Progress, RandomState, Rest, passes
from locc.runtime.ranks import END, OVER, PASS, STOP, Ranks
from locc.runtime.records import LIMIT


def fit(
    program: Compiled,
    loader: Iterable[Any],
    epochs: int = 1,
    *,
    validation: Iterable[Any] | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    scheduler_interval: str = "epoch",
    resume: bool = True,
    checkpoint: str | Path | None = None,
    every: int | None = None,
    gather: bool = True,
) -> History:
    """Train for some epochs, with a progress bar and the objectives of every module.

    A fit that was cut (by Ctrl-C, by a callback, by an exception from the loader or a step, or in another
    process whose checkpoint has been loaded) is gone on with by the next one, which takes the same loader or
    an equal one: the random state at the start of the pass under way is put back (PyTorch's, Python's,
    NumPy's and that of the loader's own generators), the batches that are done are drawn again and dropped,
    and training goes on with the next one. It ends with the same bits as a fit that was not cut, except where
    a step was cut in its midst (see `atomic` of `locc.compile`) and where workers that outlive a pass draw
    random numbers. An iterator that yields its batches only once goes on with what is left in it.

    Args:
        program: the program.
        loader: yields batches as `batch_of` reads them; iterated anew for each pass.
        epochs: number of epochs of this fit; of the whole of it, where it was cut before. Under the
            sequential schedule, of each module's stage.
        validation: evaluated after each epoch.
        progress: whether to show the progress bar: that is, to add `locc.callbacks.ProgressBar()`.
        callbacks: what takes part, in this order; see `locc.callbacks`. What they keep is in the checkpoints,
            and goes to the callback of the same class when a fit that was cut goes on.
        scheduler_interval: when the learning-rate schedulers advance: after each "epoch" (pass) in which
            their module trains, or after each "step" that updates it (every `accumulate`-th).
        resume: False forgets a fit that was cut and starts a new one.
        checkpoint: a file or "folder/" to write after each pass, as `Program.save` does; `Program.load` in a
            new process and the same call of `fit` go on from there, also where this process was killed (and
            train no more where the fit was over).
        every: write `checkpoint` after so many steps as well; under waves, after the wave that made them.
        gather: in several processes, whether every rank has the whole model at the end, and where there are
            callbacks after each pass. False keeps each rank to its own modules; `program.gather()`, called on
            all ranks, brings the others.

    Returns:
        The history of the passes that this call has ended. After Ctrl-C, which in the main thread waits for
        the step under way (a second one does not), it is returned as far as it came, with `interrupted` set;
        after `Fit.stop`, with `stopped` set.

    Raises:
        LoccError: an argument is unusable, the loader yields nothing, or less than before it was cut.
        CheckpointError: see `Program.save`.
        RunError: see `Program.step`.
    """
    if scheduler_interval not in ("epoch", "step"):
        raise LoccError(f"scheduler_interval={scheduler_interval!r}: choose 'epoch' or 'step'")
    if type(epochs) is not int or epochs < 0:
        raise LoccError(f"epochs={epochs}: give a number of at least 0")
    if every is not None and (type(every) is not int or every < 1 or checkpoint is None):
        raise LoccError(f"every={every!r}: give a number of steps, at least 1, and checkpoint=")
    if not isinstance(loader, Iterable):
        raise LoccError(f"loader must be iterable; found {type(loader).__name__}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise LoccError(f"callbacks must be instances of locc.callbacks.Callback; found {callback!r}")
    first = _complete(program, loader)
    if checkpoint is not None and _restarted() and program.steps == 0 and exists(checkpoint):
        load(program, Path(checkpoint))
    if every is not None and program.ranks is not None and program.settings.replay is not None:
        raise LoccError(
            f"every={every}: in schedule='replay' ranks meet at the end of a pass alone; leave it out"
        )
    resumed = resume and program.progress is not None
    left = _begin(program, loader, epochs, resume)
    ranks = program.ranks
    taking_part = [*([ProgressBar()] if progress else []), *callbacks]
    if ranks is not None and not ranks.leads:
        taking_part = [callback for callback in callbacks if callback.everywhere]
    state = _state(program, loader, validation, resumed, taking_part)
    training = program.training and program.model.training
    if not training:
        program.train()
    run = _Fit(
        state,
        loader,
        first,
        validation,
        taking_part,
        scheduler_interval == "step",
        checkpoint,
        every,
        Interrupts(held=ranks is not None),
        _keeping(program),
        ranks is not None and ranks.told(gather and bool(callbacks)),
    )
    with ExitStack() as ends:
        try:
            with run.interrupts.handled():
                _start(state, taking_part, ends)
                run.passes(left)
                if gather:
                    program.gather()
            program.progress = None
        except KeyboardInterrupt:  # Ctrl-C, or a callback
            if ranks is not None:
                _stop_together(program, ranks, state.history)
                if gather:
                    program.gather()
            state.history.interrupted = state.history.stopped is None
        except BaseException as error:
            if ranks is not None:
                ranks.fail(error)
            raise
        finally:
            if not training:
                program.eval()
    return state.history


def _keeping(program: Compiled) -> Keeping | None:
    """Return what keeps the features of a fit, if that was asked for."""
    settings, built = program.settings, program.built
    if settings.features is None:
        return None
    shared = couplings(built.ir, None) if built.certificate is None else built.certificate.couplings
    return Keeping(built.ir, shared, Storage(settings.features, settings.features_limit or LIMIT))


def _restarted() -> bool:
    """Whether torchrun has started this process again, after one of its kind had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _stop_together(program: Compiled, ranks: Ranks, history: History) -> None:
    """Stop on all ranks after the same batch."""
    if ranks.failed or not ranks.stages:
        error = KeyboardInterrupt()
        ranks.fail(error)
        raise error
    if ranks.leads:
        ranks.follow(STOP, program.steps)
    program.count()
    history.stopped = ranks.told(history.stopped)


def _state(
    program: Compiled, loader: Any, validation: Any, resumed: bool, callbacks: Sequence[Callback]
) -> Fit:
    """Return what the callbacks see; they receive what a fit that was cut has kept of them."""
    progress = program.progress
    assert progress is not None
    kept = progress.callbacks() if resumed else []
    for callback in callbacks:
        found = next((one for one in kept if one[0] == type(callback).__name__), None)
        if found is not None:
            kept.remove(found)
            callback.restore(found[1])
    progress.callbacks = lambda: [one for callback in callbacks for one in _kept(callback)]
    return Fit(program, progress, _length(loader), validation is not None, resumed)


def _start(state: Fit, callbacks: Sequence[Callback], ends: ExitStack) -> None:
    """Let each callback start, and be told of the end."""
    try:
        for callback in callbacks:
            callback.on_fit_start(state)
            ends.callback(callback.on_fit_end, state)
    except BaseException:
        if not state.resumed:  # nothing has begun that could go on
            state.program.progress = None
        raise


def _kept(callback: Callback) -> list[list[Any]]:
    """Return a callback's name and state, as JSON has them."""
    name, state = type(callback).__name__, callback.state()
    try:
        return [] if state is None else [[name, json.loads(json.dumps(state))]]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"what {name}.state() returns is not JSON: {error}") from error


def _complete(program: Compiled, loader: Iterable[Any]) -> Rest | None:
    """Compile on the first batch what is not complete yet; put it back into what yields it only once."""
    if program._built is not None:
        return None
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise LoccError("the loader yielded no batch")
    program.complete(batch_of(first, program.settings.labels_within)[0], FEW)
    return Rest(batches, [first]) if batches is loader else None


def _begin(program: Compiled, loader: Iterable[Any], epochs: int, resume: bool) -> list[Pass]:
    """Set the program's progress, to that of a fit that was cut where there is one; return what is left."""
    at = program.progress
    every = passes(program.phases, epochs, program.warm)
    if at is None or not resume:
        outside = program.phase if at is None else at.outside
        program.progress = Progress(epochs, _random(program, loader), outside)
        return every
    left = [one for one in every if one.at >= at.at]
    if epochs < at.at[1] or (not left and epochs < at.epochs):
        raise LoccError(
            f"epochs={epochs}: a fit of {at.epochs} epochs was cut in epoch {at.at[1]}, and fit goes on with "
            f"it; give epochs={at.epochs} to end it, or resume=False to start a new one"
        )
    at.epochs = epochs
    return left


def _random(program: Compiled, loader: Any) -> RandomState:
    """Return the random state from which a pass starts; that of rank 0, where there are several."""
    now = RandomState.now(loader, program.device)
    return now if program.ranks is None else program.ranks.told(now)


@dataclass
class _Fit:
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
        return self.state.program

    @property
    def progress(self) -> Progress:
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
        self.state.batches = _length(self.loader) if one.steps is None else one.steps
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
            progress.turn(_random(program, self.loader))
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


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # a DataLoader over an iterable data set has a len that raises
        return None
