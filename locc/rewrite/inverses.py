"""Inverse networks: what leads from the values that a module sends back to those that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc.ir import TensorSpec, TrainingGraph
from locc.nn import ACTIVATIONS, Factory, build_inverse
from locc.rewrite.building import build, build_custom
from locc.rewrite.layouts import layout_at, spec_of
from locc.rewrite.traits import ending

Activation = str | Callable[[Tensor], Tensor]
"""What ends an inverse: a name of `locc.nn.ACTIVATIONS`, or a function of one tensor."""

_RANGES: dict[object, str] = {
    nn.Tanh: "tanh",
    torch.tanh: "tanh",
    functional.tanh: "tanh",
    "tanh": "tanh",
    nn.Sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    functional.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
}


class _JointInverse(nn.Module):
    """activation(sum of one linear inverse for each value that a module sends)."""

    def __init__(self, parts: Sequence[nn.Module], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.activation = activation

    def forward(self, *values: Tensor) -> Tensor:
        """Map the values that a module sends to one that it read."""
        total: Tensor = self.parts[0](values[0])
        for part, value in zip(self.parts[1:], values[1:], strict=True):
            total = total + part(value)
        return self.activation(total)


@dataclass(frozen=True)
class InverseMaker:
    """Builds the inverse of a module for one of the values that it reads.

    Attributes:
        activation: a name that `build_inverse` knows, a function, or "auto", see `range_of`.
        factory: (module's output, value it reads) -> network, instead of `build_inverse`.
        init: "orthogonal" (unit singular values, zero biases), "xavier" (normal, zero biases) or "pytorch"
            (each layer's own).
        biased: whether a linear inverse has biases, which a difference of two of its values takes out again.
    """

    activation: Activation = "auto"
    factory: Factory | None = None
    init: str = "orthogonal"
    biased: bool = True

    def build(self, ir: TrainingGraph, name: str, value: fx.Node, outputs: Sequence[fx.Node]) -> nn.Module:
        """Build the network that maps the values `outputs`, in this order, to `value`, for the module `name`.

        Raises:
            MethodError: a value has no known layout, or a part would be too large.
        """
        if self.factory is not None:
            parts = [build_custom(self.factory, name, spec_of(v), spec_of(value), "inverse") for v in outputs]
            return parts[0] if len(parts) == 1 else _JointInverse(parts, ACTIVATIONS["linear"])
        activation = range_of(value, ir.root) if self.activation == "auto" else self.activation
        function = ACTIVATIONS[activation] if isinstance(activation, str) else activation

        def part(output: fx.Node, end: Activation) -> nn.Module:
            def make(source: TensorSpec, read: TensorSpec) -> nn.Module:
                start, goal = layout_at(ir, output), layout_at(ir, value)
                return build_inverse(source, read, end, from_layout=start, to_layout=goal)

            network = build(make, name, spec_of(output), spec_of(value))
            return self._started(network, biased=function is not ACTIVATIONS["linear"])

        if len(outputs) == 1:
            return part(outputs[0], function)
        return _JointInverse([part(v, "linear") for v in outputs], function)

    def _started(self, network: nn.Module, biased: bool) -> nn.Module:
        """Give the layers of an inverse their initial values, which are orthogonal so far."""
        for layer in network.modules():
            if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                if self.init == "pytorch":
                    layer.reset_parameters()
                elif self.init == "xavier":
                    nn.init.xavier_normal_(layer.weight)
                if not (biased or self.biased):
                    layer.bias = None
        return network


def range_of(value: fx.Node, root: nn.Module) -> str:
    """Return "tanh" or "sigmoid", whose range is that of a value which ends in one, else "linear".

    A ReLU counts as linear: target propagation with ReLU inverses diverges.
    """
    return _RANGES.get(ending(value, root), "linear")
