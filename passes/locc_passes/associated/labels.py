"""The label stream: codes of labels, the autoencoders that make and decode them, and their warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc.ir import BatchDim, Phase, TensorSpec, TrainingGraph, owned_tensor
from locc.losses import Loss
from locc.nn import Factory, Layout, build_label_encoder, guess_layout, one_hot
from locc.rewrite import Pass, build, build_custom, layout_at, own_target, prediction_spec, spec_of


@dataclass(frozen=True)
class Code:
    """Encoded labels t_i.

    Attributes:
        value: the node: with `batch` the codes of a batch, otherwise those of all classes, each a row.
        spec: of the codes of a batch.
        layout: of the same.
        batch: see `value`.
        first: whether it is t_0, the label itself.
    """

    value: fx.Node
    spec: TensorSpec
    layout: Layout
    batch: bool
    first: bool = False

    def rows(self, ir: TrainingGraph, owner: str) -> fx.Node:
        """Return `value` in an owner's program, without a tape where it is another's."""
        return self.value if self.value.meta["owner"] == owner else ir.stop_gradient(owner, self.value)

    def of_batch(self, ir: TrainingGraph, owner: str) -> fx.Node:
        """Return the codes of a batch in an owner's program, without a tape where they are another's."""
        found = self.rows(ir, owner)
        if self.batch:
            return found
        return ir.emit(owner, by_label, found, *labels_of(ir, owner), role="label", spec=self.spec)


@dataclass(frozen=True)
class Labels(Pass):
    """Encodes labels: t_0 = onehot(y), t_i = g_i(sg t_{i-1}), where g_i and the decoder h_i have one owner.

    Where a code is that of one label, by itself, there is a code for each class: C rows, and one more for
    what has no label. Readers take from these what the class ids of their batch say.
    """

    lr_scale: float = 2.0
    factory: Factory | None = None

    def first(self, ir: TrainingGraph, owner: str, batch: bool) -> Code:
        """Return t_0."""
        spec, layout = prediction_spec(ir), label_layout(ir)
        classes = layout.channels(spec)
        make = label_rows if batch else class_rows
        rows = spec if batch else TensorSpec((classes + 1, classes), spec.dtype)
        arguments = labels_of(ir, owner)
        value = ir.emit(owner, make, *arguments, spec.dtype, role="label", name="t_0", spec=rows)
        return Code(value, spec, layout, batch, first=True)

    def encode(
        self, ir: TrainingGraph, owner: str, above: Code, spec: TensorSpec, layout: Layout | None
    ) -> Code:
        """Return t_i, of a given shape, by an encoder of the owner's."""
        made = guess_layout(spec, layout)
        source, result = above.spec, spec
        layouts: dict[str, Any] = {"from_layout": above.layout, "to_layout": made}
        if not above.batch and label_layout(ir).kind != "flat":  # a label is one of many in a row
            source, result, layouts = one_label(above.spec, above.layout), one_label(spec, made), {}
        if self.factory is not None:
            network = build_custom(self.factory, owner, source, result, "label encoder")
        else:
            make = partial(build_label_encoder, one_hot=above.first, **layouts)
            network = build(make, owner, source, result)
        path = ir.add_module(f"encoder_{owner.removesuffix('.label')}", network)
        return Code(ir.call(owner, path, above.rows(ir, owner), role="label"), spec, made, above.batch)

    def train(self, ir: TrainingGraph, owner: str, loss: fx.Node) -> None:
        """Give encoder and decoder their objective and rate."""
        ir.objective(owner, loss, "autoencoder")
        ir.scale_lr(owner, self.lr_scale)


@dataclass(frozen=True)
class LabelsAhead(Pass):
    """Declares a warm-up: so many steps of the autoencoders alone, on each class as often, without data.

    By Adam each of the d weights of a unit that reads a code moves by the learning rate, and d of them move
    its sum: at 0.8 / d no unit is thrown in a step to where its sigmoid is flat.
    """

    steps: int = 0

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the phases, where the loss takes class ids."""
        owners = tuple(n.meta["owner"] for n in ir.nodes(role="autoencoder"))
        codes = [spec_of(n) for n in ir.nodes(role="label") if n.op == "call_module"]
        rate = 0.8 / max(math.prod(spec.concrete(1)[1:]) for spec in codes)
        ids = every_class(ir)
        if self.steps and Loss.of(ir.loss_function).misfit(ids, len(ids)) is None:
            first = Phase("labels", owners, warmup=True, steps=self.steps, made=ids, lr=rate)
            ir.phases = (first, Phase("train", tuple(ir.owners)))


def every_class(ir: TrainingGraph) -> Tensor:
    """Return class ids for the prediction, as few rows as hold every class, each as often as can be."""
    scores, layout = prediction_spec(ir), label_layout(ir)
    dims = (d for i, d in enumerate(scores.shape) if i != layout.channel_dim)
    spec, classes = TensorSpec(tuple(dims), torch.int64), layout.channels(scores)
    each = math.prod(spec.concrete(1))
    shape = spec.concrete(-(-classes // each))
    order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(0))
    return (order % classes).reshape(shape)


def label_layout(ir: TrainingGraph) -> Layout:
    """Return where the classes of the prediction are."""
    return guess_layout(prediction_spec(ir), layout_at(ir, ir.prediction))


def one_label(spec: TensorSpec, layout: Layout) -> TensorSpec:
    """Return the spec of rows of one label each, where `spec` has one at each position."""
    return TensorSpec((BatchDim(), layout.channels(spec)), spec.dtype)


def labels_of(ir: TrainingGraph, owner: str) -> tuple[Any, ...]:
    """Return the target in an owner's program, and what says how to read it: see `label_rows`."""
    spec, layout = prediction_spec(ir), label_layout(ir)
    return own_target(ir, owner), layout.channels(spec), layout.channel_dim, len(spec.shape)


def label_rows(target: Tensor, classes: int, dim: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Return class ids as one-hot vectors along `dim`; a target of `rank` dimensions is vectors already."""
    if _vectors(target, rank):
        return target.to(dtype)
    return one_hot(target, classes, dtype=dtype).movedim(-1, dim)


def class_rows(target: Tensor, classes: int, dim: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Return t_0 of every class, [C+1,C], the last row zero for what has no label.

    A target that is vectors, or has fewer labels than that, gives a row for each of its labels instead.
    """
    if _each(target, classes, rank):
        return label_rows(target, classes, dim, rank, dtype).movedim(dim, -1).flatten(0, -2)
    return torch.eye(classes + 1, classes, dtype=dtype, device=target.device)


def by_label(codes: Tensor, target: Tensor, classes: int, dim: int, rank: int) -> Tensor:
    """Return for each label of the target its row of codes: what `class_rows` became in the encoders."""
    found = functional.embedding(_rows_of(target, classes, dim, rank), codes.flatten(1))
    return found.movedim(-1, dim) if rank > 2 else found.reshape(-1, *codes.shape[1:])


def mean_by_label(a: Tensor, b: Tensor, target: Tensor, classes: int, dim: int, rank: int) -> Tensor:
    """Return the mean squared error of rows of codes over the labels of a target, shape []."""
    share = one_hot(_rows_of(target, classes, dim, rank).flatten(), len(a), dtype=a.dtype).mean(0)
    return share @ (a - b).square().mean(1)


def _vectors(target: Tensor, rank: int) -> bool:
    return target.is_floating_point() or target.dim() == rank


def _each(target: Tensor, classes: int, rank: int) -> bool:
    return _vectors(target, rank) or target.numel() <= classes


def _rows_of(target: Tensor, classes: int, dim: int, rank: int) -> Tensor:
    """Return the row of each label, in the shape of the target without its classes."""
    if _each(target, classes, rank):
        shape = target.movedim(dim, -1).shape[:-1] if _vectors(target, rank) else target.shape
        return torch.arange(shape.numel(), device=target.device).reshape(shape)
    return target.where((target >= 0) & (target < classes), classes).long()


def ends_in(
    ir: TrainingGraph, node: fx.Node, kinds: tuple[type[nn.Module], ...], names: tuple[str, ...]
) -> bool:
    """Whether a value ends in a layer of some kinds, or a function of some names."""
    if node.op == "call_module":
        return isinstance(owned_tensor(ir.root, str(node.target)), kinds)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in names
