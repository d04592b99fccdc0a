"""The network that inference runs where it is not the user's model that does."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from locc.ir import Inputs, Root, TrainingGraph
from locc.runtime.offload import Offload


class Folded(nn.Module):
    """The inference path of a program, called as the user's model is.

    It is what a method leaves that folds the network. With `offload`, owners take turns, without a tape.
    """

    def __init__(self, root: Root, ir: TrainingGraph, offload: Offload | None = None) -> None:
        super().__init__()
        self.graph: Any = fx.GraphModule(root, ir.inference) if offload is None else _Turns(root, ir, offload)
        self.signature = ir.captured.signature
        self.rebuild = ir.captured.inference_output or ir.captured.output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the user's forward does."""
        return self.rebuild(*self.graph(*self.signature.bind(Inputs(args, kwargs))))


class _Turns(fx.Interpreter):
    """Runs the inference path, each owner with its tensors where it computes."""

    def __init__(self, root: Root, ir: TrainingGraph, offload: Offload) -> None:
        super().__init__(root, graph=ir.inference)
        self.owners, self.offload = ir.owners, offload

    def __call__(self, *inputs: Any) -> Any:
        # What a tape keeps would not be there for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            try:
                return self.run(*inputs)
            finally:
                self.offload.rest()

    def run_node(self, node: fx.Node) -> Any:
        """Run a node in its owner's turn."""
        if node.meta.get("owner") in self.owners:
            values = {held.name: value for held, value in self.env.items()}
            self.offload.turn(node.meta["owner"], values)
        return super().run_node(node)
