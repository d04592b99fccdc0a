"""Passes for local objectives: an auxiliary head on each module but the last, and the user's loss on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from locc.errors import MethodError
from locc.ir import TensorSpec, TrainingGraph
from locc.ir.graph import node_parameters
from locc.ir.ops import Rebuild
from locc.losses import Loss
from locc.nn import Factory, Layout, build_head, build_pred_head, check_shapes, guess_layout, layout_of
from locc.rewrite import Pass
from locc_passes.chain import add_all

LossLike = str | Callable[[Any, Any], Tensor]

_RELAYOUTS = {
    *("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "einsum"),
    *("reshape", "view", "flatten", "unflatten"),
}


@dataclass(frozen=True)
class AttachHeads(Pass):
    """Gives each output of every module but the last a head, whose result has the shape of the prediction.

    Attributes:
        head: a kind of `locc.nn.build_head`, "pred" for `build_pred_head`, or a factory (boundary spec,
            output spec) -> module. "auto" is "mlp-sr" on images and "linear" elsewhere.
        layout: hint for `locc.nn.guess_layout` where the shape of a boundary misleads it.
        undropped: read a value before the dropout that ends its module, as `before_dropout` finds it.
        options: further keywords of the builder.
    """

    head: str | Factory = "auto"
    layout: str | None = None
    undropped: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Every module but the last sends a value that it can train on."""
        yield from untrained(ir)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Build the heads and call them on the modules' outputs."""
        for owner, value in local_values(ir, self.undropped):
            network = self._build(ir, owner, value)
            path = ir.add_module(f"{owner}_head_{value.name}", network)
            ir.call(owner, path, value, role="head", spec=prediction_spec(ir))

    def _build(self, ir: TrainingGraph, owner: str, value: fx.Node) -> nn.Module:
        if isinstance(self.head, str):
            options = {"layout": self.layout or layout_at(ir, value), "output_layout": output_layout(ir)}
            maker: Callable[..., nn.Module] = build_pred_head
            if self.head != "pred":
                maker, options = build_head, options | {"kind": self._kind(spec_of(value), options["layout"])}
            make = partial(maker, **options, **self.options)
            return build(make, owner, spec_of(value), prediction_spec(ir))
        return build_custom(self.head, owner, spec_of(value), prediction_spec(ir), "head")

    def _kind(self, boundary: TensorSpec, hint: Any) -> str:
        """MLP-SR was made for feature maps: its BatchNorm takes from a vector the scale that tells most."""
        if self.head != "auto":
            return str(self.head)
        return "mlp-sr" if guess_layout(boundary, hint).kind == "image" else "linear"

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Each module but the last has a head for each of its outputs; the last has none."""
        for owner in ir.modules:
            found = len(ir.nodes(owner.name, "head"))
            wanted = 0 if owner is ir.last else sum(name == owner.name for name, _ in local_values(ir, False))
            if found != wanted:
                yield f"module '{owner.name}' has {found} heads instead of {wanted}"


@dataclass(frozen=True)
class LocalLoss(Pass):
    """Gives each module with heads the sum of the losses of their results as its objective.

    Attributes:
        loss: of (head output, target), by name or callable; the user's own loss unless given.
    """

    loss: LossLike | None = field(default=None)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add a loss to every head and an objective to every module that has some."""
        for owner in ir.modules:
            terms = [head_loss(ir, head, self.loss) for head in ir.nodes(owner.name, "head")]
            if terms:
                ir.objective(owner.name, add_all(ir, owner.name, terms), "loss")

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Each module with a head has an objective."""
        for owner in ir.modules:
            if ir.nodes(owner.name, "head") and not ir.objectives(owner.name):
                yield f"module '{owner.name}' has a head and no objective"


def head_loss(ir: TrainingGraph, head: fx.Node, loss: LossLike | None = None) -> fx.Node:
    """Apply the user's loss, or `loss`, to a head's result.

    A callable loss receives what the user's forward returns, with the head's result in the place of the
    prediction and nothing in that of other tensors; a named one, like `loss`, receives the head's result.
    """
    owner = str(head.meta["owner"])
    function = ir.loss_function if loss is None else Loss(loss)
    value = head
    if loss is None and isinstance(ir.output.target, Rebuild) and getattr(function, "name", None) is None:
        value = ir.emit(owner, Imitated(ir.output, ir.prediction), head, role="head_output")
    scalar = TensorSpec((), torch.float32)
    return ir.emit(owner, function, value, ir.target, role="head_loss", spec=scalar)


class Imitated:
    """What the user's forward returns, with a head's result in the place of the prediction."""

    def __init__(self, output: fx.Node, prediction: fx.Node) -> None:
        assert isinstance(output.target, Rebuild)
        self.rebuild = output.target
        self.values = [Absent() if isinstance(v, fx.Node) else v for v in output.args]
        self.places = [i for i, v in enumerate(output.args) if v is prediction]
        self.__name__ = self.__qualname__ = self.rebuild.__name__

    def __call__(self, head: Tensor) -> Any:
        """Return the structure for a head's result."""
        return self.rebuild(*[head if i in self.places else v for i, v in enumerate(self.values)])


class Absent:
    """Stands for an output of the model that a local head does not give; any use of it is an error."""

    def __getattr__(self, name: str) -> Any:
        raise _absent()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        """Refuse any operation."""
        raise _absent()


def _absent() -> MethodError:
    return MethodError(
        "the loss reads an output of the model other than its prediction, and a module's head gives the "
        "prediction alone; pass local_loss=callable(head_output, target) for the modules before the last"
    )


def untrained(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for each module but the last that sends no value it could train on."""
    for owner in ir.modules[:-1]:
        if not _trainable(ir, owner.name):
            yield (
                f"module '{owner.name}' sends no floating-point value that its own parameters compute, so no "
                "local loss can train it; move the split"
            )


def local_values(ir: TrainingGraph, undropped: bool) -> list[tuple[str, fx.Node]]:
    """Return (module, value) for each value on which a local loss belongs, the last module's left out.

    Args:
        ir: the training graph.
        undropped: return what enters the dropout that ends a module instead of what leaves it.
    """
    values = [(owner.name, value) for owner in ir.modules[:-1] for value in _trainable(ir, owner.name)]
    return [(owner, before_dropout(ir, value) if undropped else value) for owner, value in values]


def _trainable(ir: TrainingGraph, owner: str) -> list[fx.Node]:
    return [value for value in ir.outputs(owner) if _trains(ir, value)]


def _trains(ir: TrainingGraph, value: fx.Node) -> bool:
    """Whether a parameter of the value's own module lies behind it."""
    todo, seen = [value], {value}
    while todo:
        node = todo.pop()
        if any(p.requires_grad for _, p in node_parameters(ir.root, node)):
            return True
        here = [n for n in node.all_input_nodes if n.meta["owner"] == value.meta["owner"] and n not in seen]
        new = [n for n in here if _carries_gradient(n)]
        seen.update(new)
        todo.extend(new)
    return False


def _carries_gradient(node: fx.Node) -> bool:
    spec = node.meta.get("spec")
    return not isinstance(spec, TensorSpec) or spec.differentiable


_DROPOUTS = {
    getattr(home, name)
    for home in (torch, nn.functional)
    for name in (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
        *("feature_dropout", "dropout_", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_"),
    )
    if hasattr(home, name)
}


def is_dropout(ir: TrainingGraph, node: fx.Node) -> bool:
    """Whether a node is an `nn.Dropout*` leaf or a call of a dropout function."""
    if node.op == "call_module":
        return isinstance(ir.root.get_submodule(str(node.target)), nn.modules.dropout._DropoutNd)
    return node.op == "call_function" and node.target in _DROPOUTS


def before_dropout(ir: TrainingGraph, value: fx.Node) -> fx.Node:
    """Return the value before the dropout that ends its module, or the value itself where none does.

    Recognised is dropout whose result is the boundary value itself: nothing may follow it in the module.
    Where it works in place it is given a copy, so that the value before it survives.
    """
    while is_dropout(ir, value):
        source = value.args[0] if value.args else value.kwargs.get("input")
        if not isinstance(source, fx.Node) or source.meta["owner"] != value.meta["owner"]:
            return value
        if source.target is torch.clone and source.meta["role"] == "copy":
            source = source.all_input_nodes[0]  # the copy of an earlier pass
        elif _in_place(ir, value):
            if len(source.users) > 1:
                return value
            _give_copy(ir, value, source)
        value = source
    return value


def _give_copy(ir: TrainingGraph, node: fx.Node, source: fx.Node) -> None:
    copy = ir.emit(str(source.meta["owner"]), torch.clone, source, role="copy", spec=source.meta["spec"])
    node.replace_input_with(source, copy)
    if "mutates" in node.meta:
        node.meta["mutates"] = tuple(copy if n is source else n for n in node.meta["mutates"])


def _in_place(ir: TrainingGraph, node: fx.Node) -> bool:
    if "mutates" in node.meta:
        return True
    if node.op == "call_module":
        return bool(getattr(ir.root.get_submodule(str(node.target)), "inplace", False))
    return bool(node.kwargs.get("inplace", False)) or getattr(node.target, "__name__", "").endswith("_")


def spec_of(value: fx.Node) -> TensorSpec:
    """Return the spec of a tensor node."""
    spec = value.meta["spec"]
    assert isinstance(spec, TensorSpec)
    return spec


def prediction_spec(ir: TrainingGraph) -> TensorSpec:
    """Return the spec of the prediction, the shape that a head's result has."""
    return spec_of(ir.prediction)


def output_layout(ir: TrainingGraph) -> Layout | None:
    """Return the layout of a dense prediction (pixels, voxels), where its layers tell; otherwise None."""
    return layout_at(ir, ir.prediction) if len(prediction_spec(ir).shape) > 3 else None


def layout_at(ir: TrainingGraph, value: fx.Node) -> Layout | None:
    """Infer the layout of a value from the nearest layer of its module that tells, if any does.

    The walk goes up through nodes of the same shape: activations, sums, dropout. It ends at an operation
    that moves dimensions.
    """
    todo, seen = [value], {value}
    while todo:
        node = todo.pop(0)
        if node.op == "call_module":
            found = layout_of(ir.root.get_submodule(str(node.target)), spec_of(value))
            if found is not None:
                return found
        elif str(getattr(node.target, "__name__", node.target)) in _RELAYOUTS:
            continue
        same = [n for n in node.all_input_nodes if _alike(n, value) and n not in seen]
        seen.update(same)
        todo.extend(same)
    return None


def _alike(node: fx.Node, value: fx.Node) -> bool:
    spec = node.meta.get("spec")
    same_owner = node.meta["owner"] == value.meta["owner"]
    return same_owner and isinstance(spec, TensorSpec) and spec.shape == spec_of(value).shape


def build(make: Factory, owner: str, source: TensorSpec, result: TensorSpec) -> nn.Module:
    """Call a builder of `locc.nn`, and name the module in what it refuses."""
    try:
        return make(source, result)
    except MethodError as error:
        raise MethodError(f"module '{owner}': {error}") from error


def build_custom(
    make: Factory, owner: str, source: TensorSpec, result: TensorSpec, what: str, *, check: bool = True
) -> nn.Module:
    """Call a user's factory and check what it returns; parameters take the dtype of the boundary.

    Raises:
        MethodError: no module, a lazy one, or (with `check`) one whose result does not fit `result`.
    """
    network = make(source, result)
    if not isinstance(network, nn.Module):
        found = type(network).__name__
        raise MethodError(f"{what} of module '{owner}': the factory returned a {found}, not a module")
    if any(is_lazy(p) for p in (*network.parameters(), *network.buffers())):
        raise MethodError(
            f"{what} of module '{owner}': the factory returned lazy parameters; size them from the "
            f"boundary {source}"
        )
    network = network.to(source.dtype)
    if check:
        check_shapes(network, (source,), result, f"{what} of module '{owner}'")
    return network
