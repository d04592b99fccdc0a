"""Callbacks that watch a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from locc.callbacks.base import Callback, Fit
from locc.errors import LoccError, nearest
from locc.runtime import checkpoint
from locc.runtime.history import Epoch

MODES = ("min", "max")


class _Watching(Callback):
    """Knows the best value of a metric in a fit."""

    def __init__(self, monitor: str, mode: str | None, min_delta: float) -> None:
        name = type(self).__name__
        if mode is not None and mode not in MODES:
            raise LoccError(f"{name}: mode={mode!r}; choose 'min' or 'max'")
        if min_delta < 0:
            raise LoccError(f"{name}: min_delta={min_delta}; give a number of at least 0")
        self.monitor, self.min_delta = monitor, min_delta
        self.mode = mode or ("max" if monitor.endswith("accuracy") else "min")
        self.best: float | None = None

    def on_fit_start(self, fit: Fit) -> None:
        """Forget what another fit reached.

        Raises:
            LoccError: this fit does not report the metric.
        """
        if self.monitor not in fit.names:
            remedy = (
                "give fit a validation= loader"
                if self.monitor.startswith("validation_") and not fit.validates
                else nearest(self.monitor, fit.names)
            )
            raise LoccError(
                f"{type(self).__name__} watches '{self.monitor}', which this fit does not report; {remedy}"
            )
        if not fit.resumed:
            self.best = None

    def better(self, epoch: Epoch) -> bool | None:
        """Whether a pass has the best value so far; None where it does not compute it."""
        value = epoch.metrics.get(self.monitor)
        if value is None:
            if epoch.validation is not None and self.monitor == "validation_accuracy":
                raise LoccError(
                    f"{type(self).__name__} watches 'validation_accuracy', but the target has no classes; "
                    "watch 'validation_loss'"
                )
            return None
        if self.best is not None:
            gain = value - self.best if self.mode == "max" else self.best - value
            if not gain > self.min_delta:  # not so for NaN either
                return False
        elif value != value:
            return False
        self.best = value
        return True

    def state(self) -> Any:
        return {"best": self.best}

    def restore(self, state: Any) -> None:
        self.best = state["best"]


class EarlyStopping(_Watching):
    """Ends a fit when a metric has not become better for `patience` passes in a row that compute it.

    Args:
        monitor: "validation_loss", "validation_accuracy", "loss", or an objective's name.
        patience: number of passes.
        min_delta: by how much a better value must be better.
        mode: "min" or "max"; by default "max" for an accuracy, otherwise "min".
    """

    def __init__(
        self,
        monitor: str = "validation_loss",
        patience: int = 3,
        *,
        min_delta: float = 0.0,
        mode: str | None = None,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        if type(patience) is not int or patience < 1:
            raise LoccError(f"EarlyStopping: patience={patience!r}; give a number of passes, at least 1")
        self.patience = patience
        self.waited = 0

    def on_fit_start(self, fit: Fit) -> None:
        """Begin to count, or go on; a fit that was stopped stays so."""
        super().on_fit_start(fit)
        if not fit.resumed:
            self.waited = 0
        self._judge(fit)

    def on_epoch_end(self, fit: Fit, epoch: Epoch) -> None:
        """Count, and stop."""
        better = self.better(epoch)
        if better is not None:
            self.waited = 0 if better else self.waited + 1
        self._judge(fit)

    def _judge(self, fit: Fit) -> None:
        if self.waited >= self.patience:
            fit.stop(f"'{self.monitor}' has not become better than {self.best} in {self.waited} passes")

    def state(self) -> Any:
        """Return the best value and for how long it has been so."""
        return {"best": self.best, "waited": self.waited}

    def restore(self, state: Any) -> None:
        """Take them."""
        super().restore(state)
        self.waited = state["waited"]


class BestCheckpoint(_Watching):
    """Saves the program, as `Program.save` does, after each pass in which a metric is the best so far.

    Args:
        path: the file, or "folder/".
        monitor: as for `EarlyStopping`.
        mode: as for `EarlyStopping`.
    """

    everywhere = True

    def __init__(
        self, path: str | Path, monitor: str = "validation_loss", *, mode: str | None = None
    ) -> None:
        super().__init__(monitor, mode, 0.0)
        self.path = path

    def on_epoch_end(self, fit: Fit, epoch: Epoch) -> None:
        """Save, if it is the best."""
        if self.better(epoch):
            checkpoint.save(fit.program, self.path)
