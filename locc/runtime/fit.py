"""`fit`: how it begins, goes on where it was cut, and ends."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from locc.callbacks import Callback, Fit, ProgressBar
from locc.errors import CheckpointError, LoccError, warn
from locc.facts.traffic import couplings
from locc.losses import Loss
from locc.runtime.checkpoint import exists, load
from locc.runtime.evaluation import batch_of, check_iterable
from locc.runtime.features import Keeping, Storage
from locc.runtime.folder import is_meant
from locc.runtime.history import History
from locc.runtime.interrupts import Interrupts
from locc.runtime.program import FEW, Compiled
from locc.runtime.progress import Pass, Progress, Rest, passes
from locc.runtime.ranks import STOP, Ranks
from locc.runtime.records import LIMIT
from locc.runtime.run import Run, length_of, random_of

GUESSING = 0.98
"""The share of the loss of a guess above which a classifier has learnt nothing."""
STEPS = 50
"""After which that is worth a word."""


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
        raise LoccError(f"epochs={epochs!r}: give a number of at least 0")
    if every is not None and (type(every) is not int or every < 1 or checkpoint is None):
        raise LoccError(f"every={every!r}: give a number of steps, at least 1, and checkpoint=")
    check_iterable(loader, "loader")
    if validation is not None:
        check_iterable(validation, "validation")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise LoccError(f"callbacks must be instances of locc.callbacks.Callback; found {callback!r}")
    first = _complete(program, loader)
    if program.ranks is not None:
        asked = {"epochs": epochs, "scheduler_interval": scheduler_interval, "resume": resume, "every": every}
        asked |= {"gather": gather, "validation": None if validation is None else "given"}
        asked["checkpoint"] = checkpoint and ("a folder" if is_meant(checkpoint) else "a file")
        asked["callbacks"] = [type(one).__name__ for one in callbacks if one.everywhere]
        program.ranks.agree({f"{name}= of fit": value for name, value in asked.items()})
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
    run = Run(
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
            if ranks is None or ranks.leads:
                _tell_of_guessing(program, state.history)
        except KeyboardInterrupt:  # Ctrl-C, or a callback
            if ranks is not None:
                _stop_together(program, ranks, state.history, run.interrupts.cut)
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


def _tell_of_guessing(program: Compiled, history: History) -> None:
    """Warn where some passes have left a classifier as good as one that guesses."""
    losses = [epoch.loss for epoch in history.epochs if epoch.loss is not None]
    loss = Loss.of(program.loss_function)
    classes = loss.spec.shape[loss.dims[0]] if loss.name == "cross_entropy" and loss.spec else None
    if not losses or not isinstance(classes, int) or program.steps < STEPS:
        return
    if min(losses) > GUESSING * math.log(classes):
        warn(
            f"after {program.steps} steps the loss is {losses[-1]:.4g}, and that of a guess among {classes} "
            f"classes {math.log(classes):.4g}: the network has learnt nothing so far. It trains with "
            f"{program.built.training}; try other rates (a published recipe was made for the networks of its "
            "paper; optimizer=locc.Recipe() is Adam at 1e-3), more passes, or fewer splits"
        )


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


def _stop_together(program: Compiled, ranks: Ranks, history: History, cut: bool) -> None:
    """Stop on all ranks after the same batch; one that Ctrl-C has cut asks rank 0."""
    if ranks.failed or not ranks.stages:
        error = KeyboardInterrupt()
        ranks.fail(error)
        raise error
    if ranks.leads:
        ranks.follow(STOP, program.steps)
    elif cut:
        with ranks.failing(), suppress(KeyboardInterrupt):
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
    return Fit(program, progress, length_of(loader), validation is not None, resumed)


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
        program.progress = Progress(epochs, random_of(program, loader), outside)
        return every
    left = [one for one in every if one.at >= at.at]
    if epochs < at.at[1] or (not left and epochs < at.epochs):
        raise LoccError(
            f"epochs={epochs}: a fit of {at.epochs} epochs was cut in epoch {at.at[1]}, and fit goes on with "
            f"it; give epochs={at.epochs} to end it, or resume=False to start a new one"
        )
    at.epochs = epochs
    return left
