"""The model's output: its loss as an objective, and the error that the loss has there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from locc.ir import Task, TrainingGraph
from locc.rewrite.passes import Pass


@dataclass(frozen=True)
class OutputLoss(Pass):
    """Gives the last module the user's loss as its objective."""

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the loss and its objective."""
        ir.objective(ir.last.name, ir.apply_loss(), "loss")


def output_error(ir: TrainingGraph, task: Task | None = None) -> fx.Node:
    """Return the gradient of the user's loss with respect to the prediction (or a task's), in its shape.

    It belongs to the last module, and holds the mean over the batch where the loss takes one. For softmax
    and cross-entropy on logits it is (softmax(prediction) - onehot(y)) / B.
    """
    return ir.gradient(ir.apply_loss(), ir.prediction if task is None else task.value)
