"""Training and evaluation loops."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from locc.errors import LoccError
from locc.ir import Phase
from locc.losses import correct
from locc.runtime.program import FEW, Program


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per sample, accuracy (None where the target has no classes), number of samples."""

    loss: float
    accuracy: float | None
    samples: int

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"
        return f"loss {self.loss:.4f}{accuracy}"


@dataclass(frozen=True)
class Epoch:
    """One pass over the data: mean loss and objectives over its steps, and the validation after it.

    `loss` is None in a pass that does not compute the user's loss (one that trains only inverses, say).
    """

    number: int
    phase: str | None
    loss: float | None
    objectives: dict[str, float]
    seconds: float
    validation: Evaluation | None = None

    def __str__(self) -> str:
        phase = f" [{self.phase}]" if self.phase else ""
        loss = f"  loss {self.loss:.4f}" if self.loss is not None else ""
        objectives = "".join(f"  {name} {value:.4g}" for name, value in self.objectives.items())
        validation = f"  validation: {self.validation}" if self.validation else ""
        return f"epoch {self.number}{phase}{loss}{objectives}{validation}"


@dataclass
class History:
    """What `fit` saw, pass by pass."""

    epochs: list[Epoch] = field(default_factory=list)
    interrupted: bool = False

    def __str__(self) -> str:
        return "\n".join(str(epoch) for epoch in self.epochs)


def batch_of(batch: Any) -> tuple[Any, Any]:
    """Split what a loader yields into (x, y).

    A pair is (x, y); a longer tuple is (inputs..., y); a dict gives up its "labels" or "target".

    Raises:
        LoccError: there is no target to be found.
    """
    if isinstance(batch, Mapping):
        for key in ("labels", "target", "targets", "label"):
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise LoccError(f"a batch is a dict with keys {list(batch)} and none of them is 'labels' or 'target'")
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise LoccError(
        f"the loader must yield (x, y) pairs, (inputs..., y) or a dict with 'labels';"
        f" found {type(batch).__name__}"
    )


def fit(
    program: Program,
    loader: Iterable[Any],
    epochs: int = 1,
    *,
    validation: Iterable[Any] | None = None,
    progress: bool = True,
    scheduler_interval: str = "epoch",
) -> History:
    """Train for some epochs, with a progress bar and the objectives of every module.

    Args:
        program: the program.
        loader: yields batches as `batch_of` reads them; iterated anew for each pass.
        epochs: number of epochs; under the sequential schedule, of each module's stage.
        validation: evaluated after each epoch.
        progress: whether to show the progress bar.
        scheduler_interval: "epoch" or "step": how often the learning-rate schedulers advance.

    Returns:
        The history. After Ctrl-C it is returned as far as it came, with `interrupted` set. The program goes
        on from there; a step that was cut short has updated the modules that it came to, unless
        `atomic=True`.

    Raises:
        LoccError: an argument is unusable, or the loader yields nothing.
        RunError: see `Program.step`.
    """
    if scheduler_interval not in ("epoch", "step"):
        raise LoccError(f"scheduler_interval={scheduler_interval!r}: choose 'epoch' or 'step'")
    if type(epochs) is not int or epochs < 0:
        raise LoccError(f"epochs={epochs}: give a number of at least 0")
    if not isinstance(loader, Iterable):
        raise LoccError(f"loader must be iterable; found {type(loader).__name__}")
    if program._built is None:
        batches = iter(loader)
        first = next(batches, None)
        if first is None:
            raise LoccError("the loader yielded no batch")
        program.complete(batch_of(first)[0], FEW)
        if batches is loader:  # a generator: put the batch back
            loader = itertools.chain([first], batches)
    history = History()
    training = program.training and program.model.training
    if not training:
        program.train()
    with _bar(program, progress) as bar:
        try:
            for number, phase in _passes(program, epochs):
                history.epochs.append(
                    _epoch(program, loader, number, phase, validation, bar, scheduler_interval)
                )
                program.epochs += 1
                if bar is not None:
                    bar.console.print(str(history.epochs[-1]), highlight=False, markup=False)
        except KeyboardInterrupt:
            history.interrupted = True
        finally:
            if not training:
                program.eval()
    return history


def _passes(program: Program, epochs: int) -> Iterator[tuple[int, str | None]]:
    """Yield the passes over the data, setting the program's phase for each."""
    phases = program.phases
    sequential = program.settings.schedule == "sequential"
    before = program.phase
    first = program.epochs == 0
    rounds: list[tuple[int, Phase | None]] = []
    if sequential:
        rounds = [(number, phase) for phase in phases for number in range(1, epochs + 1)]
    else:
        if first:
            rounds += [(0, p) for p in phases if p.warmup for _ in range(p.epochs)]
        turns = [p for p in phases if not p.warmup for _ in range(p.epochs)]
        for number in range(1, epochs + 1):
            rounds += [(number, p) for p in turns] or [(number, None)]
    try:
        for number, phase in rounds:
            program.phase = phase.name if phase else None
            yield number, program.phase
    finally:
        if not sequential:
            program.phase = before


def _epoch(
    program: Program,
    loader: Iterable[Any],
    number: int,
    phase: str | None,
    validation: Iterable[Any] | None,
    bar: Progress | None,
    scheduler_interval: str,
) -> Epoch:
    started = time.perf_counter()
    sums: dict[str, Tensor] = {}
    steps = 0
    title = f"epoch {number}" + (f" [{phase}]" if phase else "")
    total = len(loader) if isinstance(loader, Sized) else None
    task = bar.add_task(title, total=total, losses="") if bar is not None else None
    try:
        for batch in loader:
            x, y = batch_of(batch)
            report = program.step(x, y)
            steps += 1
            whole = {} if report.network_loss is None else {"loss": report.network_loss}
            found = {**whole, **report.objectives}
            for name, value in found.items():
                sums[name] = sums[name] + value.float() if name in sums else value.float()
            if scheduler_interval == "step":
                _advance(program, found)
            if bar is not None and task is not None:
                # Reading a loss synchronises the device, so the bar shows them now and then.
                if steps % 20 == 0 or steps == total:
                    bar.update(task, losses=_text(sums, steps))
                bar.update(task, advance=1)
    finally:
        if bar is not None and task is not None:
            bar.remove_task(task)
    if steps == 0:
        raise LoccError(
            "the loader yielded no batch; a generator can be iterated only once, use a DataLoader or a list"
        )
    means = {name: float(value) / steps for name, value in sums.items()}
    program.built.executor.raise_deferred()
    if scheduler_interval == "epoch":
        _advance(program, means)
    seconds = time.perf_counter() - started
    checked = evaluate(program, validation) if validation is not None else None
    return Epoch(number, phase, means.pop("loss", None), means, seconds, checked)


def _advance(program: Program, means: Mapping[str, Any]) -> None:
    training = program.plan(program.phase).trains
    for name, scheduler in program.schedulers.items():
        if name not in training:
            continue
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            # Each module watches its own objectives: the loss knows nothing of an early module.
            scheduler.step(sum(float(v) for key, v in means.items() if key.rpartition(".")[0] == name))
        else:
            scheduler.step()


def _text(sums: dict[str, Tensor], steps: int) -> str:
    return "  ".join(f"{name} {float(value) / steps:.3g}" for name, value in sums.items())


def _bar(program: Program, wanted: bool) -> Any:
    if not wanted:
        return nullcontext()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[losses]}"),
        transient=True,
    )


@torch.no_grad()
def evaluate(program: Program, loader: Iterable[Any]) -> Evaluation:
    """Evaluate the inference path in eval mode, and return to the mode of before.

    The loss is the mean over the batches, weighted by their number of samples.
    """
    mode = {module: module.training for module in program.modules()}
    program.eval()
    loss = total = hits = asked = 0.0
    function = program.loss_function
    try:
        for batch in loader:
            x, y = batch_of(batch)
            output, y = program.predict(x), program._move(y)
            size = _size(y, x)
            loss += float(function(output, y)) * size
            total += size
            found = correct(output, y)
            if found is not None:
                hits += float(found.sum())
                asked += found.numel()
    finally:
        for module, training in mode.items():
            module.training = training
    if total == 0:
        raise LoccError("the loader yielded no batch to evaluate")
    return Evaluation(loss / total, hits / asked if asked else None, int(total))


def _size(y: Any, x: Any) -> int:
    for value in torch.utils._pytree.tree_leaves((y, x)):
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    return 1
