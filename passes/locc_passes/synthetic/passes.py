"""The passes of decoupled neural interfaces: predict gradients, and learn from the next module's."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc.errors import MethodError
from locc.ir import TrainingGraph, inner
from locc.nn import Factory, build_synthesiser, check_shapes, guess_layout
from locc.rewrite import (
    Pass,
    activations,
    add_all,
    build,
    build_custom,
    divided,
    judged,
    layout_at,
    output_layout,
    own_target,
    prediction_spec,
    returning,
    rows,
    spec_of,
    squared_distance,
)

FAILS = "predicts {how} of the gradient"
REMEDY = (
    "lower the modules' learning rate against its own (lr_scale), show it the labels (cdni), or normalise"
)


@dataclass(frozen=True)
class SyntheticGradients(Pass):
    """Gives each module the objective sum <h, sg[s(sg h)]>: a predicted gradient, applied at once.

    Each value that a module sends has a synthesiser of its own; those of a module form one auxiliary owner.
    A synthesiser predicts the gradient of one sample's loss, which does not depend on the batch size; the
    module divides by the number of rows where the loss is a mean.
    """

    labels: bool = False
    width: int | None = None
    lr_scale: float = 1.0
    mean: bool = True
    factory: Factory | None = None

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Labels are those of one prediction, and of the positions of each sequence."""
        if not self.labels:
            return
        yield from divided(ir)
        output = prediction_spec(ir)
        there = guess_layout(output, output_layout(ir)).sizes(output)
        for value in (v for module in ir.modules[:-1] for v in activations(ir, module.name)):
            layout = guess_layout(spec_of(value), layout_at(ir, value))
            here = layout.sizes(spec_of(value))
            if layout.kind == "sequence" and here and there and here != there and self.factory is None:
                yield (
                    f"module '{value.meta['owner']}': its sequence has {here[0]} positions, and those of the "
                    f"prediction's labels are {there[0]}, so a position has no label to show; use 'dni'"
                )

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add synthesisers and the modules' objectives."""
        for module in ir.modules[:-1]:
            values = activations(ir, module.name)
            if not values:
                continue
            helper = ir.add_owner(f"{module.name}.synthesiser", module, self.lr_scale).name
            terms = []
            for value in values:
                network = self._network(ir, value)
                path = ir.add_module(helper if len(values) == 1 else f"{helper}.{value.name}", network)
                predicted = self._predict(ir, helper, path, value)
                arriving = ir.stop_gradient(module.name, predicted)
                if self.mean:
                    arriving = ir.emit(module.name, of_batch, arriving, rows(value), role="synthetic")
                terms.append(ir.emit(module.name, inner, value, arriving, role="chain"))
            ir.objective(module.name, add_all(ir, module.name, terms), "synthetic")

    def _network(self, ir: TrainingGraph, value: fx.Node) -> nn.Module:
        spec, module = spec_of(value), str(value.meta["owner"])
        if self.factory is None:
            return build(lambda *_: self._default(ir, value), module, spec, spec)
        network = build_custom(self.factory, module, spec, prediction_spec(ir), "synthesiser", check=False)
        if not self.labels:
            check_shapes(network, (spec,), spec, f"synthesiser of module '{module}'")
        return network

    def _default(self, ir: TrainingGraph, value: fx.Node) -> nn.Module:
        classes = self._classes(ir) if self.labels else None
        return build_synthesiser(spec_of(value), classes, width=self.width, layout=layout_at(ir, value))

    @staticmethod
    def _classes(ir: TrainingGraph) -> int:
        spec = prediction_spec(ir)
        return guess_layout(spec, output_layout(ir)).channels(spec)

    def _predict(self, ir: TrainingGraph, helper: str, path: str, value: fx.Node) -> fx.Node:
        args = [ir.stop_gradient(helper, value)]
        if self.labels:
            given = (own_target(ir, helper), args[0], rows(value), self._classes(ir))
            args.append(ir.emit(helper, labels_for, *given, role="labels"))
        predicted = ir.call(helper, path, *args, role="synthetic", spec=spec_of(value))
        predicted.meta["predicts"] = value
        return predicted


@dataclass(frozen=True)
class Bootstrap(Pass):
    """Gives each synthesiser the objective ||s(sg h) - sg d||^2, summed over units, mean over the rows.

    d is the sum of what the readers of h send back, for one sample's loss: the last module the gradient of
    the loss, another one the product of its Jacobian with r = (1 - trace) s(h') + trace d' at what it sends,
    h'. With trace 0 that is the backward pass of its own update. Otherwise it is one more, which waits for
    d': what crosses is d' and the gradients, on which no module trains. The evaluation of s that trained the
    module is the one that is regressed: its tape waits for d.
    """

    mean: bool = True
    trace: float = 0.0

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the regressions, from the last module but one down to the first."""
        objectives = {str(n.meta["objective"]): n for n in ir.objectives()}
        sent: dict[fx.Node, fx.Node] = {}
        for module in reversed(ir.modules[:-1]):
            mixed = []
            for predicted in self._predictions(ir, f"{module.name}.synthesiser"):
                target = self._regress(ir, predicted, sent)
                if self.trace:
                    mixed.append(self._mixed(ir, predicted, target))
            if mixed:
                sent[objectives[f"{module.name}.synthetic"]] = add_all(ir, module.name, mixed)

    @staticmethod
    def _predictions(ir: TrainingGraph, helper: str) -> list[fx.Node]:
        return [n for n in ir.nodes(helper) if "predicts" in n.meta]

    def _regress(self, ir: TrainingGraph, predicted: fx.Node, sent: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Add the objective of one prediction, and return what it is compared with."""
        helper, value = predicted.meta["owner"], predicted.meta["predicts"]
        dim = rows(value)
        found = [ir.stop_gradient(helper, g) for g in returning(ir, value, sent)]
        if not found:
            # A reader that does nothing differentiable with h: its gradient is zero.
            target = ir.emit(helper, torch.zeros_like, ir.stop_gradient(helper, value), role="target")
        else:
            target = reduce(lambda a, b: ir.emit(helper, operator.add, a, b, role="target"), found)
            if self.mean:
                target = ir.emit(helper, of_sample, target, dim, role="target")
        distance = ir.emit(helper, squared_distance, predicted, target, dim, role="regression")
        error = judged(distance, FAILS, REMEDY)
        alone = len(self._predictions(ir, helper)) == 1
        ir.objective(helper, error, "regression" if alone else f"regression_{value.name}")
        return target

    def _mixed(self, ir: TrainingGraph, predicted: fx.Node, target: fx.Node) -> fx.Node:
        """Return <h, sg r>, whose gradient at what the module reads is r through the module."""
        helper, value = predicted.meta["owner"], predicted.meta["predicts"]
        mix = target
        if self.trace < 1:
            mix = ir.emit(helper, torch.lerp, predicted, target, self.trace, role="mixed")
        owner = str(value.meta["owner"])
        arriving = ir.stop_gradient(owner, mix)
        if self.mean:
            arriving = ir.emit(owner, of_batch, arriving, rows(value), role="mixed")
        return ir.emit(owner, inner, value, arriving, role="mixed")


def of_sample(gradient: Tensor, dim: int) -> Tensor:
    """Return the gradient of each sample's loss, from that of their mean."""
    scaled: Tensor = gradient * gradient.shape[dim]
    return scaled


def of_batch(gradient: Tensor, dim: int) -> Tensor:
    """Return the gradient of the mean loss, from those of each sample's."""
    scaled: Tensor = gradient / gradient.shape[dim]
    return scaled


def labels_for(target: Any, h: Tensor, dim: int, classes: int) -> Tensor:
    """Bring a target to the rows of `h`, as a synthesiser takes its label context.

    Args:
        target: class ids [B] or [B,*positions], or vectors [B,C], [B,*positions,C] or [B,C,*positions].
        h: the value whose gradient is predicted.
        dim: the dimension of its rows.
        classes: C.

    Returns:
        Ids or vectors with C last; positions are merged into the rows where `h` has done so.

    Raises:
        MethodError: the target is no tensor, or its rows are not those of `h`.
    """
    if not isinstance(target, Tensor):
        found = type(target).__name__
        raise MethodError(f"the label context needs a target that is one tensor, found {found}; use 'dni'")
    labels: Tensor = target
    vectors = labels.is_floating_point()
    if vectors and labels.dim() > 2 and labels.shape[-1] != classes and labels.shape[1] == classes:
        labels = labels.movedim(1, -1)
    where = labels.shape[:-1] if vectors else labels.shape
    if where.numel() == h.shape[dim] and len(where) > 1:
        labels = labels.flatten(0, len(where) - 1)
    elif not where or where[0] != h.shape[dim] or (len(where) > 1 and h.dim() == 2):
        raise MethodError(
            f"the label context needs a label for each row of the value of shape {tuple(h.shape)}, and the "
            f"target has shape {tuple(target.shape)}; split elsewhere, or use 'dni'"
        )
    return labels
