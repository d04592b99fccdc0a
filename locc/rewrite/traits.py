"""What a network is made of, as far as a method's advice depends on it."""

from __future__ import annotations

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
_RECTIFIERS = frozenset(
    [
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, "relu", "relu_"),
        *(torch.relu, functional.relu, functional.relu6, functional.leaky_relu),
    ]
)


def ending(value: fx.Node, root: nn.Module) -> object:
    """Return the kind of layer, the function or the name of the method by which a value ends."""
    if value.op != "call_module":
        return value.target
    layer: nn.Module = root.get_submodule(str(value.target))
    while type(layer) is nn.Sequential and len(layer):
        layer = layer[-1]
    return type(layer)


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
