"""Folds a network in the middle: the lower half meets the label encodings of the upper half."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc.errors import MethodError
from locc.ir import BatchDim, Boundary, Owner, TensorSpec, TrainingGraph, node_parameters, owned_tensor
from locc.nn import Factory, Layout, build_bridge, build_label_encoder, guess_layout, one_hot
from locc.rewrite import (
    Pass,
    build,
    build_custom,
    divided,
    has_rows,
    layout_at,
    own_target,
    prediction_spec,
    spec_of,
)

_SOFTMAX = (nn.Softmax, nn.LogSoftmax, nn.Softmin)


@dataclass(frozen=True)
class MergeMiddle(Pass):
    """With an odd number of modules, gives the middle one to the module before it, as its top bridge.

    Both then train on one objective, with one optimizer. A middle module that gives a map of features joins
    the top bridge but is not the whole of it where labels are one a sample: what it gives at a position has
    seen a part of the sample.
    """

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse networks that do not fold."""
        yield from unfoldable(ir)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Re-own the nodes of the middle module, in training and in inference."""
        count = len(ir.modules)
        if count % 2 == 0:
            return
        lower, middle = ir.modules[count // 2 - 1 : count // 2 + 1]
        (link,) = ir.boundaries(lower.name, middle.name)
        link.entry.replace_all_uses_with(link.value)
        ir.graph.erase_node(link.entry)
        for node in (*ir.graph.nodes, *ir.inference.nodes):
            if node.meta.get("owner") == middle.name:
                node.meta["owner"] = lower.name
        del ir.owners[middle.name]
        (top,) = ir.boundaries(lower.name)
        pooled = guess_layout(top.spec, layout_at(ir, top.value)).kind != "flat"
        if not pooled or _label_layout(ir).kind != "flat":
            top.value.meta["bridged"] = True
        ir.folded = True


@dataclass(frozen=True)
class LabelStream(Pass):
    """Feeds the upper modules, as label decoders h_i, with encodings of the label instead of activations.

    t_0 = onehot(y), t_i = g_i(sg t_{i-1}), and mean (h_i(t_i) - sg t_{i-1})^2 trains g_i and h_i, in the
    program of h_i. h_1 is the last module; a sigmoid follows it unless the model ends in one.
    """

    lr_scale: float = 2.0
    factory: Factory | None = None

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the encoders from the output down to the fold, and the autoencoders' objectives."""
        modules = ir.modules
        spec, labels = prediction_spec(ir), _label_layout(ir)
        classes, dim = labels.channels(spec), labels.channel_dim
        layout: Layout | None = labels
        above = ir.emit(
            ir.last.name,
            label_rows,
            own_target(ir, ir.last.name),
            classes,
            dim,
            len(spec.shape),
            spec.dtype,
            role="label",
            name="t_0",
            spec=spec,
        )
        decoded = self._output(ir)
        for i in range(1, len(modules) // 2 + 1):
            lower, decoder = modules[i - 1], modules[-i].name
            (link,) = ir.boundaries(consumer=decoder)
            source = above if i == 1 else ir.stop_gradient(decoder, above)
            encoded = self._encode(ir, decoder, source, layout, link)
            ir.feed(decoder, link.entry, encoded)
            loss = ir.emit(decoder, functional.mse_loss, decoded, source, role="autoencoder")
            ir.objective(decoder, loss, "autoencoder")
            ir.scale_lr(decoder, self.lr_scale)
            _output_of(ir, lower, link).meta["meets"] = (encoded, link.value)
            above, decoded, layout = encoded, link.value, layout_at(ir, link.value)
        ir.folded = True

    def _encode(
        self, ir: TrainingGraph, owner: str, source: fx.Node, layout: Layout | None, link: Boundary
    ) -> fx.Node:
        if self.factory is not None:
            network = build_custom(self.factory, owner, spec_of(source), link.spec, "label encoder")
        else:
            make = partial(build_label_encoder, from_layout=layout, to_layout=layout_at(ir, link.value))
            network = build(make, owner, spec_of(source), link.spec)
        path = ir.add_module(f"encoder_{owner}", network)
        return ir.call(owner, path, source, role="label")

    @staticmethod
    def _output(ir: TrainingGraph) -> fx.Node:
        prediction = ir.prediction
        if _ends_in(ir, prediction, (nn.Sigmoid,), ("sigmoid", "sigmoid_")):
            return prediction
        return ir.emit(ir.last.name, torch.sigmoid, prediction, role="output")


@dataclass(frozen=True)
class Bridges(Pass):
    """Trains each lower module f_i and its bridge b_i on mean (b_i(s_i) - sg t_i)^2.

    The top bridge stays in the inference path, between the lower and the upper half, unless the middle
    module is that bridge already.
    """

    expansion: float = 5.0
    factory: Factory | None = None

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the bridges and their objectives, and fold the inference path."""
        lower = ir.modules[: len(ir.modules) // 2]
        for module in lower:
            (value,) = [n for n in ir.nodes(module.name) if "meets" in n.meta]
            encoded, decoded = value.meta.pop("meets")
            target = ir.stop_gradient(module.name, encoded)
            if "bridged" not in value.meta:
                network = self._bridge(ir, module.name, value, decoded)
                path = ir.add_module(f"bridge_{module.name}", network)
                if module == lower[-1]:
                    _fold_inference(ir, path, lower, target.meta["spec"])
                value = ir.call(module.name, path, value, role="bridge")
            loss = ir.emit(module.name, functional.mse_loss, value, target, role="associate")
            ir.objective(module.name, loss, "associated")

    def _bridge(self, ir: TrainingGraph, owner: str, value: fx.Node, code: fx.Node) -> nn.Module:
        if self.factory is not None:
            return build_custom(self.factory, owner, spec_of(value), spec_of(code), "bridge")
        source, target = layout_at(ir, value), layout_at(ir, code)
        several = len(prediction_spec(ir).shape) > 2
        make = partial(
            build_bridge,
            expansion=self.expansion,
            per_position=several,
            from_layout=source,
            to_layout=target,
        )
        return build(make, owner, spec_of(value), spec_of(code))

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Every module has exactly one objective, and no value of a lower module reaches an upper one."""
        lower = {module.name for module in ir.modules[: len(ir.modules) // 2]}
        for module in ir.modules:
            if len(ir.objectives(module.name)) != 1:
                yield f"module '{module.name}' has {len(ir.objectives(module.name))} objectives"
        for boundary in ir.boundaries():
            if boundary.producer in lower and boundary.consumer not in lower:
                yield f"'{boundary.value.name}' still crosses the fold"


def label_rows(target: Tensor, classes: int, dim: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Return class ids as one-hot vectors along `dim`; a target of `rank` dimensions is vectors already."""
    if target.is_floating_point() or target.dim() == rank:
        return target.to(dtype)
    return one_hot(target, classes, dtype=dtype).movedim(-1, dim)


def _label_layout(ir: TrainingGraph) -> Layout:
    """Return where the classes of the prediction are."""
    return guess_layout(prediction_spec(ir), layout_at(ir, ir.prediction))


def unfoldable(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for each reason why a partition does not fold into components."""
    modules = ir.modules
    if len(modules) < 2:
        yield "associated learning folds a network in two and needs at least 2 modules; give a split"
        return
    yield from divided(ir)
    spec = prediction_spec(ir)
    if len(spec.shape) < 2 or spec.shape[0] != BatchDim():
        yield f"the output is {spec}, and labels are encoded: it must be class scores [B,C] or [B,T,C]"
    if _ends_in(ir, ir.prediction, _SOFTMAX, ("softmax", "log_softmax", "softmin")):
        yield "the model ends in a softmax, but al trains sigmoids; return the scores before it"
    for before, after in itertools.pairwise(modules):
        yield from _bad_link(ir, before, after)
    for boundary in ir.boundaries():
        if ir.owners[boundary.consumer].index != ir.owners[boundary.producer].index + 1:
            yield (
                f"'{boundary.value.name}' skips from module '{boundary.producer}' to '{boundary.consumer}', "
                "so the network does not fold; split where no skip connection crosses"
            )
    half = len(modules) - len(modules) // 2
    decoders = modules[half:]
    for module in decoders:
        for node in ir.nodes(module.name):
            for source in node.all_input_nodes:
                if source in ir.inputs:
                    yield (
                        f"module '{module.name}' of the upper half reads the input '{source.name}', but it "
                        "decodes labels, which know no input; split so that only lower modules read it"
                    )
    if not list(_bad_link(ir, modules[half - 1], decoders[0])):
        lower = [m.name for m in modules[:half]]
        if len(_crossing(ir, lower)) != 1:
            yield "in eval mode, other values cross the fold than in training; split where both agree"


def _bad_link(ir: TrainingGraph, before: Owner, after: Owner) -> Iterator[str]:
    found = ir.boundaries(before.name, after.name)
    pair = f"from module '{before.name}' to '{after.name}'"
    if len(found) != 1:
        yield f"{len(found)} values pass {pair}, and a component passes on one; split where one value crosses"
        return
    if not found[0].differentiable or not has_rows(found[0].value):
        yield f"{found[0].spec} passes {pair}, which is no activation; split elsewhere, or use tied='copy'"
        return
    try:
        guess_layout(found[0].spec)
    except MethodError as error:
        yield f"{pair}: {error}; split elsewhere"


def _ends_in(
    ir: TrainingGraph, node: fx.Node, kinds: tuple[type[nn.Module], ...], names: tuple[str, ...]
) -> bool:
    if node.op == "call_module":
        return isinstance(owned_tensor(ir.root, str(node.target)), kinds)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in names


def _output_of(ir: TrainingGraph, lower: Owner, link: Boundary) -> fx.Node:
    """Return the value of a lower module that its bridge reads."""
    if link.producer == lower.name:
        return link.value
    (below,) = ir.boundaries(producer=lower.name)
    return below.value


def _crossing(ir: TrainingGraph, lower: list[str]) -> list[fx.Node]:
    """Return the lower modules' values, computed with parameters, that upper ones read in eval mode."""
    trained: set[fx.Node] = set()
    for node in ir.inference.nodes:
        if node_parameters(ir.root, node) or any(n in trained for n in node.all_input_nodes):
            trained.add(node)
    return [
        n
        for n in ir.inference.nodes
        if n.meta["owner"] in lower and n in trained and any(u.meta["owner"] not in lower for u in n.users)
    ]


def _fold_inference(ir: TrainingGraph, bridge: str, lower: list[Owner], spec: TensorSpec) -> None:
    """Put the top bridge between the halves of the eval-mode forward."""
    names = [module.name for module in lower]
    graph = ir.inference
    (value,) = _crossing(ir, names)
    with graph.inserting_after(value):
        made = graph.call_module(bridge, (value,))
    made.meta.update(owner=names[-1], role="bridge", made_by="bridges", spec=spec, stack=())
    for user in list(value.users):
        if user is not made and user.meta["owner"] not in names:
            user.replace_input_with(value, made)
