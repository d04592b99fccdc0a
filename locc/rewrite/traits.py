"""What a network is made of, as far as a method's advice depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from locc.ir import TrainingGraph

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_NORM_NAMES = frozenset(["batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"])
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_RECTIFIERS = frozenset(
    [
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, "relu", "relu_"),
        *(torch.relu, functional.relu, functional.relu6, functional.leaky_relu),
    ]
)
_ELEMENTWISE: dict[str, Callable[..., Any]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
_NORMALISED: dict[str, Callable[..., Any]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "logsoftmax": torch.log_softmax,
}
_RESHAPES = frozenset(["flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "identity"])


def ending(value: fx.Node, root: nn.Module) -> object:
    """Return the kind of layer, the function or the name of the method by which a value ends."""
    return type(_last_layer(value, root)) if value.op == "call_module" else value.target


def _last_layer(value: fx.Node, root: nn.Module) -> nn.Module:
    layer: nn.Module = root.get_submodule(str(value.target))
    while type(layer) is nn.Sequential and len(layer):
        layer = layer[-1]
    return layer


def bounds_of(value: fx.Node, root: nn.Module) -> tuple[Any, ...] | None:
    """Return the sigmoid, tanh, softmax or its logarithm by which a value ends, and its other arguments."""
    node, kind = value, _kind(value, root)
    while kind in _RESHAPES and node.all_input_nodes:
        node = node.all_input_nodes[0]
        kind = _kind(node, root)
    if kind in _ELEMENTWISE:
        return (_ELEMENTWISE[kind],)
    if kind not in _NORMALISED or node is not value:
        return None
    if node.op == "call_module":
        dim: Any = _last_layer(node, root).dim
    else:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return (_NORMALISED[kind], dim) if isinstance(dim, int) else None


def _kind(node: fx.Node, root: nn.Module) -> str:
    end = ending(node, root)
    return str(getattr(end, "__name__", end)).lower().rstrip("_")


def is_rectified(value: fx.Node, root: nn.Module) -> bool:
    """Whether a value ends in a ReLU, or in a relative of it."""
    return ending(value, root) in _RECTIFIERS


def has_rectifiers(ir: TrainingGraph) -> bool:
    """Whether the model has a ReLU, or a relative of it, as a layer or as a function between its layers."""
    forward = ir.nodes(role="forward")
    layers = {type(module) for module in ir.root.model.modules()}
    return not _RECTIFIERS.isdisjoint(layers) or any(is_rectified(n, ir.root) for n in forward)


def has_norms(ir: TrainingGraph) -> bool:
    """Whether the model normalises activations, in a layer or by a function between its layers."""
    names = {getattr(node.target, "__name__", "") for node in ir.nodes(role="forward")}
    layers = any(isinstance(module, _NORMS) for module in ir.root.model.modules())
    return layers or not _NORM_NAMES.isdisjoint(names)


def averages_positions(ir: TrainingGraph) -> bool:
    """Whether a layer, or a function between layers, leaves of all positions the mean."""
    for layer in ir.root.model.modules():
        sizes = layer.output_size if isinstance(layer, _POOLS) else ()
        if sizes == 1 or (isinstance(sizes, tuple) and sizes and set(sizes) == {1}):
            return True
    return any(_name(n) == "mean" and _loses_a_dim(n) for n in ir.nodes(role="forward"))


def _loses_a_dim(node: fx.Node) -> bool:
    result, source = node.meta.get("spec"), node.all_input_nodes[0].meta.get("spec")
    return result is not None and source is not None and 1 < len(result.shape) < len(source.shape)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
