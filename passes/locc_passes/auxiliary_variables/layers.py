"""The network as block methods see it: a chain of layers, each a product, a bias and a nonlinearity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn import functional

from locc.ir import TensorSpec, TrainingGraph, stop_gradient, strip
from locc.rewrite import divided, is_dropout, learned
from locc_passes.auxiliary_variables.products import Bend, Product, Reshape, product_of

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Softplus, nn.Softsign, nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid),
)
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{f: f for f in (torch.relu, torch.tanh, torch.sigmoid, functional.silu, functional.gelu)},
    **{f: f for f in (functional.relu, functional.elu, functional.leaky_relu, functional.softplus)},
    **{n: getattr(torch, n.rstrip("_")) for n in ("relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_")},
    functional.tanh: torch.tanh,
    functional.sigmoid: torch.sigmoid,
    torch.relu_: torch.relu,
    functional.relu_: torch.relu,
}
_RELUS = (torch.relu, functional.relu)
_RESHAPES = frozenset(["flatten", "unflatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze"])
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_REMEDY = (
    "the method is defined on chains of nn.Linear and nn.Conv2d with elementwise nonlinearities, flattening "
    "and average pooling, wherever they are cut; leave it out, freeze the network up to there, or use "
    "'altmin'"
)


class UnlayeredError(Exception):
    """The network is no chain of such layers; the message is the sentence with which a method refuses it."""


@dataclass(frozen=True)
class Layer:
    """U = W * V + b and sigma(U).

    Attributes:
        owner: whose parameters these are.
        path: of the `nn.Linear` or `nn.Conv2d`, under the root.
        product: W * V as a map.
        bend: sigma.
        read: V in the forward pass, wherever it is computed.
        pre: U in the forward pass.
        post: sigma(U) in the forward pass.
    """

    owner: str
    path: str
    product: Product
    bend: Bend
    read: fx.Node
    pre: fx.Node
    post: fx.Node

    def parameter(self, ir: TrainingGraph, name: str) -> nn.Parameter | None:
        """Return the weight or the bias; None where the layer has no bias."""
        found = getattr(ir.root.get_submodule(self.path), name)
        assert found is None or isinstance(found, nn.Parameter)
        return found


def unlayered(ir: TrainingGraph) -> Iterator[str]:
    """Yield why the network is no chain of layers of fixed sizes with one prediction, for `requires`."""
    yield from divided(ir)
    try:
        layers = layers_of(ir)
    except UnlayeredError as why:
        yield str(why)
        return
    for layer in layers:
        free = {dim.name for node in (layer.read, layer.pre) for dim in node.meta["spec"].free}
        if free:
            yield (
                f"layer '{strip(layer.path)}' has sizes that may vary ({', '.join(sorted(free))}), and its "
                "variables are kept from step to step; leave them out of dynamic"
            )


def unfit(model: nn.Module) -> Iterator[str]:
    """Yield a sentence for the first module that holds parameters which train and is no such layer."""
    for name, module in model.named_modules():
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if own and not is_layer(module):
            what = f"'{name}' ({type(module).__name__}) is" if name else f"the model's '{own[0]}' is part of"
            yield f"{what} no such layer; {_REMEDY}"
            return


def is_layer(module: nn.Module | None) -> bool:
    """Whether a module is an `nn.Linear` or an `nn.Conv2d`, or a subclass that computes the same.

    One with a forward of its own is tried, with random weights on a random input.
    """
    base = next((kind for kind in LAYERS if isinstance(module, kind)), None)
    if base is None or type(module) is base:
        return base is not None
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    if not module.state_dict().keys() <= {"weight", "bias"}:
        return False
    plain: nn.Module = copy.copy(module)
    plain.__class__ = base
    try:
        with torch.no_grad(), torch.random.fork_rng():
            held = {name: torch.randn_like(p) for name, p in module.named_parameters()}
            x = torch.randn_like(module.weight.new_empty(_tried_on(module)))
            return torch.equal(*(functional_call(layer, held, (x,)) for layer in (module, plain)))
    except Exception:  # whatever its forward wants, it is another one
        return False


def _tried_on(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Return the shape of an input that a layer takes."""
    if isinstance(layer, nn.Linear):
        return (2, layer.in_features)
    height, width = (3 + k * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    return (2, layer.in_channels, height, width)


def layers_of(ir: TrainingGraph) -> list[Layer]:
    """Return the layers in forward order; what nothing below learns is data for the first one.

    Raises:
        UnlayeredError: the network has something else.
    """
    learns = learned(ir)
    found: list[Layer] = []
    weights: dict[int, str] = {}
    node = post = ir.prediction
    while node in learns:
        bend, node = _bend(ir, node)
        layer, path = _layer(ir, node), str(node.target)
        if other := weights.get(id(layer.weight)):
            raise UnlayeredError(
                f"the weight of '{strip(path)}' is used twice (by '{strip(other)}'); it solves for one use"
            )
        weights[id(layer.weight)] = path
        (source,) = node.all_input_nodes
        pre, owner, before = node, str(node.meta["owner"]), list[Callable[..., Any]]()
        while source in learns and (step := _linear_map(ir, source)) is not None:
            before[:0] = step
            (source,) = _data(source)
        node = source
        found.append(Layer(owner, path, product_of(layer, tuple(before)), bend, source, pre, post))
        post = source
    if not found:
        raise UnlayeredError("no parameter of the network trains")
    if found[0].post is not found[0].pre and _features(found[0].post) != _features(found[0].pre):
        raise UnlayeredError(f"its last layer '{strip(found[0].path)}' is followed by a change of shape")
    return found[::-1]


def _layer(ir: TrainingGraph, node: fx.Node) -> nn.Module:
    """Return the layer that a node calls."""
    layer = ir.root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not is_layer(layer) or len(node.args) != 1 or node.kwargs:
        raise UnlayeredError(f"{_named(ir, node)} is no such layer; {_REMEDY}")
    assert isinstance(layer, nn.Module)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if hooked or (isinstance(layer, nn.Conv2d) and not _plain(layer)):
        raise UnlayeredError(
            f"layer '{strip(str(node.target))}' has hooks, or padding other than a number of zeros; {_REMEDY}"
        )
    return layer


def _plain(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _named(ir: TrainingGraph, node: fx.Node) -> str:
    """Say what a node is, in the user's names."""
    if node.op == "call_module":
        return f"'{strip(str(node.target))}' ({type(ir.root.get_submodule(str(node.target))).__name__})"
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    line = f" ({node.meta['line']})" if node.meta.get("line") else ""
    return f"'{what}' in module '{node.meta['owner']}'{line}"


def _bend(ir: TrainingGraph, node: fx.Node) -> tuple[Bend, fx.Node]:
    """Return the nonlinearity by which a value ends, and what enters it."""
    node = _through(node)
    if node.op == "call_module":
        module = ir.root.get_submodule(str(node.target))
        if type(module) not in _MODULES:
            return Bend(), node
        plain = copy.copy(module)
        if getattr(plain, "inplace", False):
            plain.inplace = False  # type: ignore[assignment]
        slope = {nn.ReLU: 0.0, nn.LeakyReLU: getattr(module, "negative_slope", None)}.get(type(module))
        bend = Bend(plain, slope)
    elif node.target in _FUNCTIONS and len(node.args) == 1 and set(node.kwargs) <= {"inplace"}:
        function = _FUNCTIONS[node.target]
        bend = Bend(function, 0.0 if function in _RELUS else None)
    else:
        return Bend(), node
    (source,) = _data(node)
    return bend, _through(source)


def _through(node: fx.Node) -> fx.Node:
    """Return what a crossing value, or a copy, stands for."""
    while node.target is stop_gradient or (node.target is torch.clone and node.meta["role"] == "copy"):
        (node,) = node.all_input_nodes
    return node


def _linear_map(ir: TrainingGraph, node: fx.Node) -> list[Callable[..., Any]] | None:
    """Return what a node without parameters does to a value, as linear maps, or None where it does more."""
    if _through(node) is not node or is_dropout(ir, node):
        held = ir.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        off = getattr(held, "p", None) == 0
        if off or not is_dropout(ir, node):
            return []
        raise UnlayeredError(f"{_named(ir, node)} draws a mask that no closed form knows; {_REMEDY}")
    if node.op == "call_module":
        module = ir.root.get_submodule(str(node.target))
        if type(module) in _POOLS:
            return [module]
        if type(module) not in (nn.Flatten, nn.Unflatten, nn.Identity):
            return None
    elif getattr(node.target, "__name__", str(node.target)) not in _RESHAPES:
        return None
    return [Reshape(_features(node))]


def _features(node: fx.Node) -> tuple[int, ...]:
    spec = node.meta["spec"]
    if not isinstance(spec, TensorSpec) or spec.batch_dim != 0 or spec.free:
        raise UnlayeredError(f"'{node.name}' is {spec}, and not one row for each sample of a fixed shape")
    return spec.features


def _data(node: fx.Node) -> list[fx.Node]:
    """Return the one tensor that a node reads; sizes beside it are numbers."""
    found = [n for n in node.all_input_nodes if isinstance(n.meta.get("spec"), TensorSpec)]
    if len(found) != 1:
        raise UnlayeredError(
            f"'{node.name}' in module '{node.meta['owner']}' joins {len(found)} values; {_REMEDY}"
        )
    return found
