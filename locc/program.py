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
        history: what the last `fit` returned; None before the first one.
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

    def report(self, path: str | Path, history: History | None = None) -> Path:
        """Write a page of HTML to look at: the verdict, the curves of the training, the modules, the setup.

        Folded away in it are the certificate, the warnings, each module's program and the training graph. It
        is one file that needs no network, whole or not there. In several processes rank 0 writes it, and the
        others may call this or not.

        Args:
            path: the file; one that exists is replaced.
            history: whose curves to draw; None: those of the last `fit`, without one a page without curves.

        Returns:
            The path.

        Raises:
            LoccError: the file cannot be written, or `history` is none; what was there before is unharmed.
            RunError: the program is not complete yet, or was compiled with verify=False.
        """
        return report.write(self, Path(path), self.history if history is None else history)

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
