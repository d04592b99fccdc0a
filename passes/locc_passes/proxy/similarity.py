"""The passes of `predsim`: similarity heads, and the weighted sum of the two local errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx, nn

from locc.errors import MethodError
from locc.ir import BatchDim, Task, TensorSpec, TrainingGraph
from locc.nn import Factory, Readout, build_sim_head, guess_layout, one_hot, plan_readout, sim_loss
from locc.rewrite import (
    LossLike,
    Pass,
    add_all,
    build,
    build_custom,
    head_loss,
    heads_of,
    layout_at,
    local_modules,
    local_values,
    output_layout,
    own_target,
    prediction_spec,
    spec_of,
    untrained,
    weigh,
)


@dataclass(frozen=True)
class AttachSimilarityHeads(Pass):
    """Gives each output h of every module but the last the map z(h), h taken before dropout.

    Attributes:
        head: factory (boundary spec, output spec) -> module, of z as [B,D] or [B,D,*positions];
            `locc.nn.build_sim_head` unless given.
        layout: hint for `locc.nn.guess_layout`.
        undropped: read a value before the dropout that ends its module.
    """

    head: Factory | None = None
    layout: str | None = None
    undropped: bool = True

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Every output's samples can be compared as the labels' are."""
        yield from untrained(ir)
        for owner, value in local_values(ir, undropped=False):
            for task in ir.tasks:
                try:
                    reason = incomparable(readout(ir, value, task, self.layout), task.spec)
                except MethodError as error:
                    reason = str(error)
                if reason:
                    yield f"module '{owner}': {reason}"

    def rewrite(self, ir: TrainingGraph) -> None:
        """Build the maps and call them."""
        for owner, value in local_values(ir, self.undropped):
            path = ir.add_module(f"{owner}_sim_{value.name}", self._build(ir, owner, value))
            head = ir.call(owner, path, value, role="sim_head")
            head.meta["compare"] = [
                SimilarityLoss(readout(ir, value, task, self.layout), task.spec) for task in ir.tasks
            ]

    def _build(self, ir: TrainingGraph, owner: str, value: fx.Node) -> nn.Module:
        spec, output = spec_of(value), prediction_spec(ir)
        if self.head is not None:
            return build_custom(self.head, owner, spec, output, "similarity head", check=False)
        make = partial(build_sim_head, layout=self.layout or layout_at(ir, value))
        return build(make, owner, spec, output)

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """The modules that train on a local loss have a similarity head, and no others."""
        for owner in ir.modules:
            if bool(ir.nodes(owner.name, "sim_head")) != (owner in local_modules(ir)):
                yield f"module '{owner.name}' has {len(ir.nodes(owner.name, 'sim_head'))} similarity heads"


@dataclass(frozen=True)
class LocalErrors(Pass):
    """Gives each of `local_modules` the objective beta * similarity loss + (1 - beta) * prediction loss.

    Attributes:
        beta: weight of the similarity loss; a term of weight zero has no head and is left out.
        loss: of the prediction heads, as in `objectives.LocalLoss`.
        name: under which the objective is reported.
    """

    beta: float
    loss: LossLike | None = field(default=None)
    name: str = "predsim"

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the losses and the objectives."""
        for owner in (o.name for o in local_modules(ir)):
            sims = [
                ir.emit(owner, compare, head, own_target(ir, owner, task), role="sim_loss", spec=ir.scalar)
                for head in ir.nodes(owner, "sim_head")
                for task, compare in zip(ir.tasks, head.meta["compare"], strict=True)
            ]
            predictions = [head_loss(ir, heads, self.loss) for heads in heads_of(ir, owner)]
            terms = [weigh(ir, term, self.beta) for term in sims]
            terms += [weigh(ir, term, complement(self.beta)) for term in predictions]
            ir.objective(owner, add_all(ir, owner, terms), self.name)

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Every module that trains on a local loss has an objective."""
        for owner in local_modules(ir):
            if not ir.objectives(owner.name):
                yield f"module '{owner.name}' has no objective"


@dataclass(frozen=True)
class OutputError(Pass):
    """Gives the last module `weight` times the user's loss; in full where it is the only module.

    A single module has no local error that its loss would have to be balanced with, and is then trained
    exactly as by backpropagation.
    """

    weight: float
    zero: bool = False

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """A start at zero needs a layer that gives the output."""
        if self.zero and not _output_weights(ir):
            yield "zero_output needs a linear or convolution layer that gives the output; leave it out"

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the loss and its objective."""
        if self.zero:
            ir.initial += [(weight, torch.zeros_like(weight)) for weight in _output_weights(ir)]
        loss = ir.apply_loss()
        ir.objective(ir.last.name, weigh(ir, loss, self.weight if len(ir.modules) > 1 else 1.0), "loss")


def _output_weights(ir: TrainingGraph) -> list[Tensor]:
    """Return the weights of the layers that give the predictions."""
    nodes = [task.value for task in ir.tasks if task.value.op == "call_module"]
    layers = [ir.root.get_submodule(str(node.target)) for node in nodes]
    ends = [layer[-1] if isinstance(layer, nn.Sequential) and len(layer) else layer for layer in layers]
    return [end.weight for end in ends if isinstance(end, (nn.Linear, nn.modules.conv._ConvNd))]


def complement(beta: float) -> float:
    """Return 1 - beta, without the noise of binary fractions in the printed graph."""
    return round(1 - beta, 12)


def readout(ir: TrainingGraph, value: fx.Node, task: Task, layout: str | None) -> Readout:
    """Return how samples (or tokens) of a value correspond to those of a prediction."""
    found = layout or layout_at(ir, value)
    return plan_readout(spec_of(value), task.spec, found, output_layout(ir, task))


def classes(plan: Readout, output: TensorSpec) -> int:
    """Return the number of classes C that the prediction has."""
    if plan.squeeze:
        return 1
    if plan.target and not plan.per_position:
        return guess_layout(output).channels(output) if plan.output is None else plan.output.channels(output)
    return plan.out_features


def incomparable(plan: Readout, output: TensorSpec) -> str | None:
    """Say why samples cannot be compared as their labels are, if they cannot."""
    if classes(plan, output) < 2:
        return (
            f"the output {output} has a single value a sample, and labels of one value all look alike after "
            "centring; return one score for each class, or use method 'pred' or 'dgl'"
        )
    if plan.target and not plan.per_position:
        return (
            f"the output {output} has a label at each position and the boundary has one row a sample; cut "
            "where positions exist, or use method 'pred' or 'dgl'"
        )
    if plan.per_position and (plan.layout.kind != "sequence" or plan.source != plan.target):
        return (
            "the similarity of labels per position is defined for sequences of the output's length; the "
            f"output is {output}; use method 'pred' or 'dgl'"
        )
    return None


class SimilarityLoss:
    """The loss of (z, target): the mean square of S(z) - S(Y), Y the labels as vectors.

    A target with as many dimensions as the prediction holds vectors, in the prediction's shape, and is
    taken as it is; any other holds class ids, which become one-hot. Per token, -100 is no label.
    """

    def __init__(self, plan: Readout, output: TensorSpec) -> None:
        self.plan, self.output, self.classes = plan, output, classes(plan, output)
        self.class_dim = len(output.shape) - 1 if plan.output is None else plan.output.channel_dim
        self.__name__ = self.__qualname__ = "similarity_loss"

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape [], for `z` as a similarity head gives it and the user's target."""
        y = self.labels(target)
        if self.plan.folded_in > 1:
            z = self.plan.unfold(z).movedim(-1, 1)
        if z.dim() == y.dim() == 2 and self.output.shape[0] != BatchDim():
            z, y = z.unsqueeze(-1), y.unsqueeze(1)  # each row is a token, which may have no label
        return sim_loss(z, y)

    def labels(self, target: Tensor) -> Tensor:
        """Return the target as vectors, [B,C] or [B,T,C]."""
        if target.dim() < len(self.output.shape):
            target = one_hot(target, self.classes).movedim(-1, self.class_dim)
        return self.plan.rows_of(target)
