"""The inverse networks of target propagation, and the initial weights of the nets that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc.errors import MethodError
from locc.ir import Boundary, TensorSpec, TrainingGraph
from locc.nn import Factory, build_inverse
from locc.nn import orthogonal_ as unit_singular_values_
from locc.nn.inverses import ACTIVATIONS
from locc_passes.objectives import build, build_custom, layout_at, spec_of

Activation = str | Callable[[Tensor], Tensor]

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


class JointInverse(nn.Module):
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
            return parts[0] if len(parts) == 1 else JointInverse(parts, ACTIVATIONS["linear"])
        activation = range_of(boundary.value, ir.root) if self.activation == "auto" else self.activation
        function = ACTIVATIONS[activation] if isinstance(activation, str) else activation

        def part(value: fx.Node, end: Activation) -> nn.Module:
            def make(output: TensorSpec, read: TensorSpec) -> nn.Module:
                source, target = layout_at(ir, value), layout_at(ir, boundary.value)
                return build_inverse(output, read, end, from_layout=source, to_layout=target)

            return reset(build(make, name, spec_of(value), boundary.spec), self.init)

        if len(outputs) == 1:
            return part(outputs[0], function)
        return JointInverse([part(v, "linear") for v in outputs], function)


def reset(network: nn.Module, init: str) -> nn.Module:
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
    if value.op != "call_module":
        return _RANGES.get(value.target, "linear")
    layer: nn.Module = root.get_submodule(str(value.target))
    while type(layer) is nn.Sequential and len(layer):
        layer = layer[-1]
    return _RANGES.get(type(layer), "linear")


def orthogonal_init(model: nn.Module) -> nn.Module:
    """Give every linear layer of a model unit singular values and zero biases, in place.

    The start of Lee et al. 2015, for MLPs; call it before `compile`.

    Raises:
        MethodError: the model has no linear layer.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise MethodError(f"orthogonal_init: {type(model).__name__} has no nn.Linear; it is meant for MLPs")
    for layer in layers:
        unit_singular_values_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model
