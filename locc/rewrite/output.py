"""The model's output: its loss as an objective, and the error that the loss has there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from locc.ir import Rebuild, TensorSpec, TrainingGraph, stop_gradient
from locc.rewrite.passes import Pass

_SCALAR = TensorSpec((), torch.float32)


@dataclass(frozen=True)
class OutputLoss(Pass):
    """Gives the last module the user's loss as its objective."""

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the loss and its objective."""
        ir.objective(ir.last.name, ir.apply_loss(), "loss")


def output_error(ir: TrainingGraph) -> fx.Node:
    """Return the gradient of the user's loss with respect to the prediction, in the prediction's shape.

    It belongs to the last module, and holds the mean over the batch where the loss takes one. For softmax
    and cross-entropy on logits it is (softmax(prediction) - onehot(y)) / B.
    """
    last = ir.last.name
    rebuild = ir.output.target
    flat = list(ir.output.args) if isinstance(rebuild, Rebuild) else [ir.output]
    # The prediction is no leaf of the loss, so the loss is read once more from a copy without a tape.
    leaves = {
        v: ir.emit(last, stop_gradient, v, role="output", spec=v.meta.get("spec"))
        for v in flat
        if isinstance(v, fx.Node) and v.op != "placeholder"
    }
    copied = [leaves.get(v, v) if isinstance(v, fx.Node) else v for v in flat]
    output = ir.emit(last, rebuild, *copied, role="output") if isinstance(rebuild, Rebuild) else copied[0]
    loss = ir.loss_of(last, output, role="error")
    return ir.gradient(loss, leaves[ir.prediction])
