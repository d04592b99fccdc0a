"""Puts layers with fixed feedback in the place of linear and convolution layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from locc.ir import TensorSpec, TrainingGraph, call_with, owned_tensor, strip
from locc.nn import draw_feedback, feedback_call
from locc.rewrite import Given, Pass, learned, spec_of
from locc_passes.feedback.given import given_matrix
from locc_passes.feedback.products import products, selected, spelled

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

# Their matrices meet no activation in a product: a table that is looked up, an elementwise scale.
_NO_PRODUCT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class FeedbackMatrix(nn.Module):
    """Holds one feedback matrix B: a buffer, so checkpointed, and outside of every optimizer."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)


def feedback_layer(x: Tensor, layer: nn.Module, feedback: Tensor) -> Tensor:
    """Call `layer` on `x`; the gradient to `x` runs through `feedback`, of the shape of its weight."""
    return feedback_call(layer, x, feedback)


@dataclass(frozen=True)
class FeedbackLayers(Pass):
    """Replaces each product of an activation that needs a gradient with a weight by one with feedback.

    That is a call of a linear or convolution layer, or of a function (`F.linear`, `x @ w`, attention's packed
    projections, what a layer with a forward of its own calls). Forward value, weight and bias gradient stay
    exact; the gradient to the input goes through a matrix B of the weight's shape, drawn once or `given`, by
    the layer's path. Uses of one weight share one B. What reads only data or frozen layers sends no gradient,
    so it stays as it is.
    """

    init: str = "kaiming_uniform"
    given: Given | None = None

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse models in which some product with a weight would keep its exact gradient."""
        yield from _hidden_products(ir)
        for weight in selected(ir):
            yield (
                f"the matrices of '{_parameter(weight)}' are picked by data, where no feedback "
                "matrix can take their place; multiply sorted groups with them "
                "(Hugging Face: model.set_experts_implementation('grouped_mm'))"
            )
        for product in products(ir):
            if product.replacement is None:
                name = strip(spelled(product.weights[0]))
                yield (
                    f"'{name}' is multiplied with more than one activation, or with "
                    "another weight at once, where no feedback matrix can take its place; multiply them one "
                    "after the other"
                )
        for node in ir.graph.nodes:
            held = owned_tensor(ir.root, str(node.target)) if node.op in ("call_module", "get_attr") else None
            if node.op == "call_module" and isinstance(held, LAYERS):
                yield from _odd_layer(node, held)
            elif node.target is call_with and isinstance(owned_tensor(ir.root, node.args[0].target), LAYERS):
                yield (
                    f"layer '{strip(str(node.args[0].target))}' uses a weight that another module owns; "
                    "compile with tied='copy' to give it one of its own"
                )

    def rewrite(self, ir: TrainingGraph) -> None:
        """Replace the layers in place: names, users and order of the forward stay."""
        above = learned(ir)
        self._products(ir, above)
        paths: dict[int, str] = {}
        for node in list(ir.graph.nodes):
            layer = owned_tensor(ir.root, str(node.target)) if node.op == "call_module" else None
            if not isinstance(layer, LAYERS) or node.args[0] not in above:
                continue
            owner, path = node.meta["owner"], str(node.target)
            key = id(next(p for n, p in layer.named_parameters() if "weight" in n))
            if key not in paths:
                weight = layer.weight.detach()  # type: ignore[operator]
                held = FeedbackMatrix(self._of(strip(path), draw_feedback(weight, self.init)))
                paths[key] = ir.add_module(f"feedback_{strip(path)}", held)
            holder = ir.read(owner, path, role="module")
            matrix = ir.read(owner, f"{paths[key]}.matrix", role="feedback")
            node.meta.update(stands_for=("call_module", path), made_by=self.label)
            node.op, node.target = "call_function", feedback_layer
            node.args = (node.args[0], holder, matrix)

    def _products(self, ir: TrainingGraph, above: set[fx.Node]) -> None:
        """Replace the functions that multiply with a weight; B has the shape that it has in the product."""
        paths: dict[str, str] = {}
        for product in products(ir):
            if not any(x in above for x in product.activations):
                continue
            matrices = []
            for weight in product.weights:
                key = spelled(weight)
                if key not in paths:
                    spec = spec_of(weight)
                    drawn = torch.empty(spec.concrete(1), dtype=spec.dtype, device=_device(ir))
                    drawn = drawn.mT if product.right else drawn
                    if drawn.dim() > 2 and not product.convolves:  # a stack, as of experts: a law for each
                        each = [draw_feedback(matrix, self.init) for matrix in drawn.flatten(0, -3)]
                        drawn = torch.stack(each).view_as(drawn)
                    else:
                        drawn = draw_feedback(drawn, self.init)
                    drawn, name = drawn.mT.contiguous() if product.right else drawn, _parameter(weight)
                    held = FeedbackMatrix(self._of(name, drawn))
                    paths[key] = ir.add_module(f"feedback_{name}", held)
                matrices.append(ir.read(product.node.meta["owner"], f"{paths[key]}.matrix", role="feedback"))
            node, one = product.node, len(matrices) == 1
            node.meta.update(stands_for=(node.op, node.target), made_by=self.label)
            assert product.replacement is not None
            node.op, node.target = "call_function", product.replacement
            node.args = (node.args, matrices[0] if one else tuple(matrices))

    def _of(self, name: str, drawn: Tensor) -> Tensor:
        """Return the user's matrix of a layer, or what was drawn."""
        if self.given is None:
            return drawn
        return given_matrix(self.given, name, (TensorSpec.of(drawn), TensorSpec.of(drawn)), drawn)

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Every layer left hands no gradient down."""
        above = learned(ir)
        for node in ir.graph.nodes:
            layer = owned_tensor(ir.root, str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, LAYERS) and node.args[0] in above:
                yield f"layer '{strip(str(node.target))}' kept its exact input gradient"


def _device(ir: TrainingGraph) -> torch.device:
    return next(ir.root.parameters()).device


def _parameter(weight: fx.Node) -> str:
    """Return the path of the first parameter that a weight is computed from."""
    while weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    return strip(str(weight.target)).removesuffix(".weight")


def opened(model: nn.Module) -> Iterator[str]:
    """Yield what capture has to look at: layers, and the parameters of what multiplies by itself."""
    for name, module in model.named_modules():
        if not name or ".parametrizations." in f"{name}.":
            continue  # the model itself is open; a layer computes its own weight
        if isinstance(module, LAYERS):
            base = next(kind for kind in LAYERS if isinstance(module, kind))
            own = type(module).forward is not base.forward and not _hooked(module)
            yield f"{name}.weight" if own else name
        elif _multiplies(module) and not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            yield f"{name}.weight"


def _multiplies(module: nn.Module) -> bool:
    """Whether a module has matrices of its own, and is none of those that only look them up or scale."""
    matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1 and not _scales(p)]
    return bool(matrices) and not isinstance(module, _NO_PRODUCT)


def _scales(parameter: nn.Parameter) -> bool:
    """Whether a parameter can only scale or shift channels, as LayerScale's gamma of shape [C,1,1] does."""
    return parameter.dim() > 2 and sum(n > 1 for n in parameter.shape) <= 1


def _hooked(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def _odd_layer(node: fx.Node, layer: nn.Module) -> Iterator[str]:
    """Refuse a call that does more than the layer's own formula."""
    name = strip(str(node.target))
    base = next(kind for kind in LAYERS if isinstance(layer, kind))
    if type(layer).forward is not base.forward:
        yield f"layer '{name}' is a {type(layer).__name__} with a forward of its own; use nn.{base.__name__}"
    elif _hooked(layer):
        yield (
            f"layer '{name}' has hooks (such as torch.nn.utils.weight_norm), which a feedback layer cannot "
            "run; remove them, or use torch.nn.utils.parametrizations"
        )
    elif len(node.args) != 1 or node.kwargs:
        yield f"layer '{name}' is called with more than its input; call it with one positional argument"


def _hidden_products(ir: TrainingGraph) -> Iterator[str]:
    """Refuse weights inside closed modules, one sentence for each kind of module."""
    found: dict[str, list[str]] = {}
    for node in ir.graph.nodes:
        module = owned_tensor(ir.root, str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.Module) or isinstance(module, LAYERS):
            continue
        for name, part in module.named_modules():
            if _multiplies(part):
                where = strip(f"{node.target}.{name}" if name else str(node.target))
                found.setdefault(type(part).__name__, []).append(where)
    for kind, names in found.items():
        more = f" (as are {len(names) - 1} more)" if len(names) > 1 else ""
        yield (
            f"'{names[0]}' is a {kind}{more}, whose weights no feedback matrix can stand in for; feedback is "
            "defined for linear and convolution layers, so build it from these"
        )
