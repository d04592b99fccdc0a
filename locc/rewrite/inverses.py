"""Inverse networks: what leads from the values that a module sends back to those that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc.ir import Boundary, TensorSpec, TrainingGraph
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
        init: "orthogonal" (unit singular values, zero biases) or "pytorch" (each layer's own).
    """

    activation: Activation = "auto"
    factory: Factory | None = None
    init: str = "orthogonal"

    def build(self, ir: TrainingGraph, boundary: Boundary, outputs: Sequence[fx.Node]) -> nn.Module:
        """Build the network that maps the values `outputs`, in this order, to the one at `boundary`.

        Raises:
            MethodError: a value has no known layout, or a part would be too large.
        """
        name = boundary.consumer
        if self.factory is not None:
            parts = [build_custom(self.factory, name, spec_of(v), boundary.spec, "inverse") for v in outputs]
            return parts[0] if len(parts) == 1 else _JointInverse(parts, ACTIVATIONS["linear"])
        activation = range_of(boundary.value, ir.root) if self.activation == "auto" else self.activation
        function = ACTIVATIONS[activation] if isinstance(activation, str) else activation

        def part(value: fx.Node, end: Activation) -> nn.Module:
            def make(output: TensorSpec, read: TensorSpec) -> nn.Module:
                source, target = layout_at(ir, value), layout_at(ir, boundary.value)
                return build_inverse(output, read, end, from_layout=source, to_layout=target)

            return _reset(build(make, name, spec_of(value), boundary.spec), self.init)

        if len(outputs) == 1:
            return part(outputs[0], function)
        return _JointInverse([part(v, "linear") for v in outputs], function)


def _reset(network: nn.Module, init: str) -> nn.Module:
    """Give the layers of an inverse PyTorch's own initial values where these are asked for."""
    if init == "pytorch":
        for layer in network.modules():
            if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                layer.reset_parameters()
    return network


def range_of(value: fx.Node, root: nn.Module) -> str:
    """Return "tanh" or "sigmoid", whose range is that of a value which ends in one, else "linear".

    A ReLU counts as linear: target propagation with ReLU inverses diverges.
    """
    return _RANGES.get(ending(value, root), "linear")
