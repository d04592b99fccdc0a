"""The network that inference runs where a method folds the user's."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from locc.ir import Inputs, Root, TrainingGraph


class Folded(nn.Module):
    """The inference path of a method that folds the network, called as the user's model is."""

    def __init__(self, root: Root, ir: TrainingGraph) -> None:
        super().__init__()
        self.graph = fx.GraphModule(root, ir.inference)
        self.signature = ir.captured.signature
        self.rebuild = ir.captured.inference_output or ir.captured.output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the user's forward does."""
        return self.rebuild(*self.graph(*self.signature.bind(Inputs(args, kwargs))))
