"""Folds a network in the middle: the lower half meets the label encodings of the upper half."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional

from locc.errors import MethodError
from locc.ir import BatchDim, Boundary, Owner, TrainingGraph, node_parameters
from locc.nn import guess_layout
from locc.rewrite import Pass, advised, divided, has_rows, layout_at, prediction_spec
from locc_passes.associated.labels import Code, Labels, ends_in, label_layout

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
        if not pooled or label_layout(ir).kind != "flat":
            top.value.meta["bridged"] = True
        ir.folded = True


@dataclass(frozen=True)
class FoldedLabels(Labels):
    """Feeds the upper modules, as label decoders h_i, with codes of the label instead of activations.

    mean (h_i(t_i) - sg t_{i-1})^2 trains g_i and h_i, in the program of h_i. h_1 is the last module; a
    sigmoid follows it unless the model ends in one.
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the encoders from the output down to the fold, and the autoencoders' objectives."""
        modules = ir.modules
        links = [ir.boundaries(consumer=m.name)[0] for m in reversed(modules[-(len(modules) // 2) :])]
        above = self.first(ir, ir.last.name, not self._one_by_one(ir, links))
        decoded = self._output(ir)
        for lower, link in zip(modules, links, strict=False):
            owner = link.consumer
            code = self.encode(ir, owner, above, link.spec, layout_at(ir, link.value))
            ir.feed(owner, link.entry, code.of_batch(ir, owner))
            wanted = above.of_batch(ir, owner)
            self.train(ir, owner, ir.emit(owner, functional.mse_loss, decoded, wanted, role="autoencoder"))
            _output_of(ir, lower, link).meta["meets"] = code
            above, decoded = code, link.value
        ir.folded = True

    def _one_by_one(self, ir: TrainingGraph, links: list[Boundary]) -> bool:
        """Whether each label has a code of its own, whatever the others are."""
        if self.factory is not None or label_layout(ir).kind == "flat":
            return self.factory is None
        found = [guess_layout(link.spec, layout_at(ir, link.value)) for link in links]
        steps = prediction_spec(ir).shape[:-1]
        kinds = {layout.kind for layout in (label_layout(ir), *found)}
        return kinds == {"sequence"} and all(link.spec.shape[:-1] == steps for link in links)

    @staticmethod
    def _output(ir: TrainingGraph) -> fx.Node:
        prediction = ir.prediction
        if ends_in(ir, prediction, (nn.Sigmoid,), ("sigmoid", "sigmoid_")):
            return prediction
        return ir.emit(ir.last.name, torch.sigmoid, prediction, role="output")


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
    if ends_in(ir, ir.prediction, _SOFTMAX, ("softmax", "log_softmax", "softmin")):
        yield "the model ends in a softmax, but al trains sigmoids; return the scores before it"
    for before, after in itertools.pairwise(modules):
        yield from _bad_link(ir, before, after)
    for boundary in ir.boundaries():
        if ir.owners[boundary.consumer].index != ir.owners[boundary.producer].index + 1:
            yield (
                f"'{boundary.value.name}' skips from module '{boundary.producer}' to '{boundary.consumer}', "
                "so the network does not fold; split where no skip connection crosses"
            )
    narrow = all(len(ir.boundaries(a.name, b.name)) == 1 for a, b in itertools.pairwise(modules))
    if not narrow or len(ir.boundaries()) >= len(modules):
        yield from advised(ir)
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
        if len(crossing(ir, lower)) != 1:
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


def _output_of(ir: TrainingGraph, lower: Owner, link: Boundary) -> fx.Node:
    """Return the value of a lower module that its bridge reads."""
    if link.producer == lower.name:
        return link.value
    (below,) = ir.boundaries(producer=lower.name)
    return below.value


def crossing(ir: TrainingGraph, lower: list[str]) -> list[fx.Node]:
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


def fold_inference(ir: TrainingGraph, owner: str, bridge: str, code: Code) -> None:
    """Put the top bridge between the halves of the eval-mode forward."""
    lower = [m.name for m in ir.modules if m.index <= ir.owners[owner].index]
    (value,) = crossing(ir, lower)
    with ir.inference.inserting_after(value):
        made = ir.inference.call_module(bridge, (value,))
    made.meta.update(owner=owner, role="bridge", made_by="bridges", spec=code.spec, stack=())
    for user in list(value.users):
        if user is not made and user.meta["owner"] not in lower:
            user.replace_input_with(value, made)
