"""Forward weights that start at zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from locc.ir import TrainingGraph
from locc.rewrite import Pass
from locc_passes.feedback.layers import LAYERS


@dataclass(frozen=True)
class ZeroWeights(Pass):
    """Starts the weights and biases of every trainable linear and convolution layer at zero.

    Nøkland 2016, released code: for tanh and sigmoid networks. ReLU networks keep their own initial
    values, since a ReLU at zero passes nothing back.
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        """Note the initial values; compilation writes them once nothing can fail any more."""
        for layer in ir.root.model.modules():
            if isinstance(layer, LAYERS):
                # of a weight that is normalised, zero has no direction: it keeps its own values
                for parameter in map(layer._parameters.get, ("weight", "bias")):
                    if parameter is not None and parameter.requires_grad:
                        ir.initial.append((parameter, torch.zeros_like(parameter)))
