"""A progress bar."""

from __future__ import annotations

import textwrap

from rich import get_console
from rich import progress as rich

from locc.callbacks.base import Callback, Fit
from locc.runtime.history import Epoch
from locc.runtime.report import StepReport

_EVERY = 20
"""Reading a loss synchronises the device, so the bar shows them now and then."""
_REST = 60
"""Columns of all else on the line."""


class ProgressBar(Callback):
    """Shows a bar, on a terminal, with the mean objectives of the pass so far.

    With `lines`, a line stays of each pass.
    """

    def __init__(self, lines: bool = True) -> None:
        self.lines = lines
        self._bar: rich.Progress | None = None
        self._task = rich.TaskID(0)

    @property
    def bar(self) -> rich.Progress:
        """The bar of this fit."""
        assert self._bar is not None
        return self._bar

    def on_fit_start(self, fit: Fit) -> None:
        """Show it."""
        self._bar = rich.Progress(
            rich.TextColumn("{task.description}", markup=False),  # [phase] is no style
            rich.BarColumn(bar_width=20),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[losses]}"),
            transient=True,
            disable=not get_console().is_terminal,  # which would end with an empty line
        )
        self._bar.start()

    def on_epoch_start(self, fit: Fit) -> None:
        """Begin anew."""
        phase = f" [{fit.program.phase}]" if fit.program.phase else ""
        self._task = self.bar.add_task(
            f"epoch {fit.epoch}{phase}", total=fit.batches, completed=fit.done, losses=""
        )

    def on_step_end(self, fit: Fit, report: StepReport) -> None:
        """Advance."""
        if fit.done % _EVERY == 0 or fit.done == fit.batches:
            means = "  ".join(f"{name} {value:.3g}" for name, value in fit.means().items())
            room = max(self.bar.console.width - _REST, 12)  # or it would push the bar away
            self.bar.update(self._task, losses=textwrap.shorten(means, room, placeholder=" ..."))
        self.bar.update(self._task, advance=1)

    def on_epoch_end(self, fit: Fit, epoch: Epoch) -> None:
        """Leave a line."""
        self.bar.remove_task(self._task)
        if self.lines:
            self.bar.console.print(str(epoch), highlight=False, markup=False)

    def on_fit_end(self, fit: Fit) -> None:
        """Go."""
        self.bar.stop()
