"""Dense decoders of labels beside all of the user's modules, which encode the input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from locc.ir import BatchDim, Owner, TensorSpec, TrainingGraph
from locc.nn import build_label_decoder, with_channels
from locc.rewrite import build, divided, prediction_spec
from locc_passes.associated.labels import (
    Code,
    Labels,
    ends_in,
    label_layout,
    labels_of,
    mean_by_label,
    one_label,
)


@dataclass(frozen=True)
class DenseLabels(Labels):
    """Gives each module an auxiliary owner, with an encoder g_i and a decoder h_i of a label code.

    mean (h_i(t_i) - sg t_{i-1})^2 trains both, in the mean over the labels of the batch. h_1 gives scores,
    and a sigmoid follows it.
    """

    width: int = 256

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse outputs that are no class scores, and modules without a value to train on."""
        yield from uncoded(ir)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add encoders, decoders and objectives, from the first module up to the last."""
        layout = label_layout(ir)
        spec = with_channels(prediction_spec(ir), layout, self.width)
        above: Code | None = None
        for module in ir.modules:
            owner = ir.add_owner(f"{module.name}.label", module).name
            start = above is None
            source = self.first(ir, owner, batch=False) if above is None else above
            code = self.encode(ir, owner, source, spec, layout)
            make = partial(build_label_decoder, scores=start)
            network = build(make, owner, one_label(spec, layout), one_label(source.spec, layout))
            path = ir.add_module(f"decoder_{module.name}", network)
            decoded = ir.call(owner, path, code.value, role="decoder")
            if start:
                decoded = ir.emit(owner, torch.sigmoid, decoded, role="output")
            rows = source.rows(ir, owner)
            arguments = (decoded, rows, *labels_of(ir, owner))
            self.train(
                ir, owner, ir.emit(owner, mean_by_label, *arguments, role="autoencoder", spec=ir.scalar)
            )
            for value in met(ir, module):
                value.meta["meets"] = code
            above = code
        ir.folded = True


def met(ir: TrainingGraph, module: Owner) -> list[fx.Node]:
    """Return the values of a module that bridges read where all of the user's modules encode."""
    sent = [value for value in ir.outputs(module.name) if value.meta["spec"].batch_dim is not None]
    return [ir.prediction] if module is ir.last else sent


def predicted(ir: TrainingGraph) -> int | None:
    """Return the place of the prediction in what the forward returns, also in eval mode; None without one."""
    *_, end = ir.inference.nodes
    values = (ir.output,) if ir.output is ir.prediction else ir.output.args
    return (
        values.index(ir.prediction) if ir.prediction in values and len(values) == len(end.args[0]) else None
    )


def gives_shares(ir: TrainingGraph) -> bool:
    """Whether the model itself makes probabilities of its scores."""
    return ends_in(
        ir, ir.prediction, (nn.Sigmoid, nn.Softmax, nn.Softmin), ("sigmoid", "sigmoid_", "softmax", "softmin")
    )


def uncoded(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for each reason why labels cannot be encoded beside all modules of a partition."""
    yield from divided(ir)
    spec = prediction_spec(ir)
    if len(spec.shape) < 2 or spec.shape[0] != BatchDim():
        yield f"the output is {spec}, and labels are encoded: it must be class scores [B,C] or [B,T,C]"
    if predicted(ir) is None:
        yield "in eval mode the model returns other values than in training; return the same in both"
    for module in ir.modules:
        if not met(ir, module):
            yield f"module '{module.name}' sends no activation for a bridge to read; move the split"


def prolong(ir: TrainingGraph, owner: str, bridge: str, decoders: list[str], code: Code) -> None:
    """Put the top bridge and the decoders behind the eval-mode forward: what they give is the prediction."""
    graph, spec, dim = ir.inference, prediction_spec(ir), label_layout(ir).channel_dim
    *_, end = graph.nodes
    results = list(end.args[0])
    place = predicted(ir)
    assert place is not None
    inside = dim != len(spec.shape) - 1  # a decoder takes codes along the last dimension

    def add(
        kind: str, target: Any, args: tuple[Any, ...], spec: TensorSpec, role: str = "decoder"
    ) -> fx.Node:
        node = graph.create_node(kind, target, args)
        node.meta.update(owner=owner, role=role, made_by="bridges", spec=spec, stack=())
        return node

    with graph.inserting_before(end):
        node = add("call_module", bridge, (results[place],), code.spec, "bridge")
        if inside:
            node = add("call_function", torch.movedim, (node, dim, -1), last(code.spec, dim))
        for path in decoders:
            final = path == decoders[-1]
            node = add("call_module", path, (node,), last(spec if final else code.spec, dim))
        if inside:
            node = add("call_function", torch.movedim, (node, -1, dim), spec)
        if gives_shares(ir):
            node = add("call_function", torch.sigmoid, (node,), spec)
    results[place] = node
    end.args = (tuple(results),)


def last(spec: TensorSpec, dim: int) -> TensorSpec:
    """Return `spec` with a dimension moved behind all others."""
    return TensorSpec((*spec.shape[:dim], *spec.shape[dim + 1 :], spec.shape[dim]), spec.dtype)
