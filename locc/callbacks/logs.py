"""Callbacks that write down what a fit reports."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, TextIO

from locc.callbacks.base import Callback, Fit
from locc.errors import LoccError
from locc.runtime.history import Epoch
from locc.runtime.report import StepReport


class CSVLog(Callback):
    """Writes a row for each pass: epoch, phase, steps, seconds, and every metric of `Fit.names`.

    A file with the same columns is continued.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._file: TextIO | None = None

    def on_fit_start(self, fit: Fit) -> None:
        """Open the file.

        Raises:
            LoccError: it cannot be written, or has other columns.
        """
        self._columns = ["epoch", "phase", "steps", "seconds", *fit.names]
        try:
            self._file = self.path.open("a+", newline="", encoding="utf-8")
        except OSError as error:
            raise LoccError(f"CSVLog cannot write '{self.path}': {error.strerror or error}") from error
        self._file.seek(0)
        found = next(csv.reader(self._file), None)
        if found is None:
            csv.writer(self._file).writerow(self._columns)
        elif found != self._columns:
            self._file.close()
            raise LoccError(
                f"CSVLog: '{self.path}' has the columns {', '.join(found)}, and this fit has "
                f"{', '.join(self._columns)}; give another file"
            )

    def on_epoch_end(self, fit: Fit, epoch: Epoch) -> None:
        """Write a row."""
        assert self._file is not None
        known = {
            "epoch": epoch.number,
            "phase": epoch.phase,
            "steps": fit.program.steps,
            "seconds": f"{epoch.seconds:.3f}",
            **epoch.metrics,
        }
        csv.writer(self._file).writerow([known.get(name) for name in self._columns])
        self._file.flush()

    def on_fit_end(self, fit: Fit) -> None:
        """Close the file."""
        assert self._file is not None
        self._file.close()


class TensorBoard(Callback):
    """Writes every metric of each pass for TensorBoard, at the number of steps that were made.

    Args:
        folder: where the event file goes.
        every: after so many steps, write the loss and the objectives of the step as well. Reading them waits
            for the device.

    Raises:
        LoccError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, every: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LoccError(
                "TensorBoard needs the package tensorboard: run `pip install 'locc[tensorboard]'`"
            ) from error
        if every is not None and (type(every) is not int or every < 1):
            raise LoccError(f"TensorBoard: every={every!r}; give a number of steps, at least 1")
        self.folder, self.every = Path(folder), every
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def on_fit_start(self, fit: Fit) -> None:
        """Open the event file."""
        self._writer = self._make(str(self.folder))

    def on_step_end(self, fit: Fit, report: StepReport) -> None:
        """Write the step, where it is its turn."""
        steps = fit.program.steps
        if self.every is not None and steps % self.every == 0:
            whole = {} if report.network_loss is None else {"loss": report.network_loss}
            for name, value in {**whole, **report.objectives}.items():
                self._writer.add_scalar(f"step/{name}", float(value), steps)

    def on_epoch_end(self, fit: Fit, epoch: Epoch) -> None:
        """Write the pass."""
        for name, value in epoch.metrics.items():
            self._writer.add_scalar(f"epoch/{name}", value, fit.program.steps)
        self._writer.flush()

    def on_fit_end(self, fit: Fit) -> None:
        """Close the event file."""
        self._writer.close()
