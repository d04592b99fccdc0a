"""What a callback is, and what it sees of a fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from locc.runtime.history import Epoch, History
from locc.runtime.program import Compiled
from locc.runtime.progress import Progress
from locc.runtime.report import StepReport


@dataclass
class Fit:
    """A fit under way.

    Attributes:
        program: what trains.
        progress: where the fit stands.
        batches: how many a pass has; None where the loader does not say.
        validates: whether each pass ends with a validation.
        resumed: whether this goes on with a fit that was cut.
        history: the passes that are over.
    """

    program: Compiled
    progress: Progress
    batches: int | None
    validates: bool
    resumed: bool
    history: History = field(default_factory=History)

    @property
    def epoch(self) -> int:
        """The epoch under way, from 1; 0 in a warm-up."""
        return self.progress.at[1]

    @property
    def done(self) -> int:
        """How many batches of the pass under way are done."""
        return self.progress.batches

    @property
    def names(self) -> list[str]:
        """What `Epoch.metrics` may hold in this fit."""
        objectives = [str(node.meta["objective"]) for node in self.program.ir.objectives()]
        validation = ["validation_loss", "validation_accuracy"] if self.validates else []
        return ["loss", *objectives, *validation]

    def means(self) -> dict[str, float]:
        """Return the mean loss and objectives of the pass so far. Reading them synchronises the device."""
        return {name: float(value) / self.done for name, value in self.progress.sums.items()}

    def stop(self, why: str) -> None:
        """End the fit after the step or the pass under way, as Ctrl-C does; `History.stopped` says why."""
        self.history.stopped = why


class Callback:
    """Takes part in a fit: `program.fit(loader, callbacks=[...])`. Override what you need; all does nothing.

    Every event comes where the program is whole, so that a callback may evaluate or save it. What it raises
    ends the fit and arrives as it is; the next fit goes on from there. The tensors of a report are on the
    device, and reading one waits for it: do so only as often as you need the number.

    Attributes:
        everywhere: in several processes, whether it takes part in each of them instead of on rank 0 alone, as
            what saves the program has to. Every rank then gets an equal one, and has to do the same.
    """

    everywhere: ClassVar[bool] = False

    def on_fit_start(self, fit: Fit) -> None:
        """Before the first pass."""

    def on_epoch_start(self, fit: Fit) -> None:
        """Before each pass over the data; `fit.program.phase` is the phase that it trains."""

    def on_update(self, fit: Fit, module: str, report: StepReport) -> None:
        """After each step, for each module (or auxiliary) whose optimizer has updated it in the step."""

    def on_step_end(self, fit: Fit, report: StepReport) -> None:
        """After each step."""

    def on_epoch_end(self, fit: Fit, epoch: Epoch) -> None:
        """After each pass and its validation, before `checkpoint=` is written."""

    def on_fit_end(self, fit: Fit) -> None:
        """At the end, however it comes, if `on_fit_start` was well."""

    def state(self) -> Any:
        """Return what to keep in a checkpoint, as JSON; None for nothing."""
        return None

    def restore(self, state: Any) -> None:
        """Take what `state` of a callback of this class returned, before a cut fit goes on."""
