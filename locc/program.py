"""What `compile` returns: a compiled model with everything that a user does to it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from locc import report
from locc.diagnosis import Diagnosis, diagnose
from locc.runtime import Compiled, checkpoint
from locc.runtime.evaluation import evaluate
from locc.runtime.fit import fit
from locc.runtime.history import Evaluation, History


class Program(Compiled):
    """A model with one training program per module.

    Calling it runs the inference path; `train()`, `eval()` and `to()` work as for any module. The
    model's own parameters are trained in place.

    Attributes:
        history: of the last `fit`.
    """

    history: History | None = None

    def fit(self, loader: Iterable[Any], epochs: int = 1, **options: Any) -> History:
        """Train for some epochs; see `locc.runtime.fit.fit`."""
        self.history = fit(self, loader, epochs, **options)
        return self.history

    def evaluate(self, loader: Iterable[Any]) -> Evaluation:
        """Return loss and accuracy of the inference path; see `locc.runtime.evaluation`."""
        return evaluate(self, loader)

    def diagnose(self, loader: Iterable[Any], steps: int = 10) -> Diagnosis:
        """Train for some steps, look at every module, and undo it all; see `locc.diagnosis.diagnose`."""
        return diagnose(self, loader, steps)

    def report(self, path: str | Path) -> Path:
        """Write a page of what was proved, of the modules, and of the last `fit`; see `locc.report`."""
        return report.write(self, Path(path), self.history)

    def save(self, path: str | Path) -> None:
        """Write everything that training needs to go on bit for bit; see `locc.runtime.checkpoint`."""
        checkpoint.save(self, path)

    def load(self, path: str | Path) -> None:
        """Go on from a saved state; see `locc.runtime.checkpoint`."""
        checkpoint.load(self, Path(path))

    def export_onnx(self, path: str | Path, **options: Any) -> Path:
        """Write the inference path as one ONNX file; see `locc.export`."""
        from locc import export  # it loads onnxruntime

        self.whole()
        return export.export_onnx(self, Path(path), **options)

    def export_onnx_modules(self, folder: str | Path, **options: Any) -> Path:
        """Write one ONNX file per module and a manifest; see `locc.export`."""
        from locc import export

        self.whole()
        return export.export_onnx_modules(self, Path(folder), **options)
