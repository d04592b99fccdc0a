"""The passes of `predsim`: similarity heads, classifiers of projected labels, and the sum of local errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from locc.errors import MethodError
from locc.ir import BatchDim, Task, TensorSpec, TrainingGraph
from locc.nn import (
    Factory,
    Readout,
    build_head,
    build_pred_head,
    build_sim_head,
    guess_layout,
    one_hot,
    plan_readout,
    sim_loss,
)
from locc.rewrite import (
    LossLike,
    Pass,
    add_all,
    blocked,
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
        projected: z is h itself, and is compared with labels that a fixed random matrix has brought to so
            many numbers (the biologically plausible variant).
        dim_in_decoder: with `projected`, largest number of features that are left of a map.
    """

    head: Factory | None = None
    layout: str | None = None
    undropped: bool = True
    projected: int | None = None
    dim_in_decoder: int = 4096

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Every output's samples can be compared as the labels' are."""
        yield from untrained(ir)
        yield from blocked(ir)
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
            compare = [SimilarityLoss(readout(ir, value, task, self.layout), task.spec) for task in ir.tasks]
            head.meta["compare"] = [
                (loss, projection(ir, owner, i, loss, self.projected)) for i, loss in enumerate(compare)
            ]

    def _build(self, ir: TrainingGraph, owner: str, value: fx.Node) -> nn.Module:
        spec, output = spec_of(value), prediction_spec(ir)
        if self.head is not None:
            return build_custom(self.head, owner, spec, output, "similarity head", check=False)
        plans = [readout(ir, value, task, self.layout) for task in ir.tasks]
        whole = any(plan.per_position for plan in plans)  # each position is compared by itself
        limit = math.inf if whole else self.dim_in_decoder
        bare = None if self.projected is None else limit
        make = partial(build_sim_head, bare=bare, layout=self.layout or layout_at(ir, value))
        return build(make, owner, spec, output)

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """The modules that train on a local loss have a similarity head, and no others."""
        for owner in ir.modules:
            if bool(ir.nodes(owner.name, "sim_head")) != (owner in local_modules(ir)):
                yield f"module '{owner.name}' has {len(ir.nodes(owner.name, 'sim_head'))} similarity heads"


@dataclass(frozen=True)
class AttachSignHeads(Pass):
    """Gives each output of every module but the last a classifier of the signs of its projected labels.

    The classifier learns by feedback alignment. Runs after `AttachSimilarityHeads` or in its place.

    Attributes:
        projected: how many numbers a fixed random matrix makes of a label.
        dim_in_decoder: largest number of features that the classifier reads.
        layout: hint for `locc.nn.guess_layout`.
        undropped: read a value before the dropout that ends its module.
    """

    projected: int = 128
    dim_in_decoder: int = 4096
    layout: str | None = None
    undropped: bool = True

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Every output's samples have labels, as for their similarities."""
        yield from AttachSimilarityHeads(layout=self.layout, undropped=self.undropped).requires(ir)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Build the classifiers and call them."""
        for owner, value in local_values(ir, self.undropped):
            for i, task in enumerate(ir.tasks):
                compare = SignLoss(readout(ir, value, task, self.layout), task.spec)
                shape = list(task.spec.shape)
                shape[compare.class_dim] = self.projected
                make = partial(
                    build_pred_head,
                    feedback=True,
                    dim_in_decoder=self.dim_in_decoder,
                    layout=self.layout or layout_at(ir, value),
                    output_layout=output_layout(ir, task),
                )
                network = build(make, owner, spec_of(value), TensorSpec(tuple(shape), task.spec.dtype))
                path = ir.add_module(f"{owner}_signs_{value.name}" + (f"_{i}" if i else ""), network)
                head = ir.call(owner, path, value, role="sign_head")
                head.meta["compare"] = (task, compare, projection(ir, owner, i, compare, self.projected))


@dataclass(frozen=True)
class LocalErrors(Pass):
    """Gives each of `local_modules` the objective beta * similarity loss + (1 - beta) * prediction loss.

    Attributes:
        beta: weight of the similarity loss; a term of weight zero is left out.
        loss: of the prediction heads, as in `objectives.LocalLoss`.
        name: under which the objective is reported.
        alpha: weight of another objective of each module; this one has 1 - alpha.
    """

    beta: float
    loss: LossLike | None = field(default=None)
    name: str = "predsim"
    alpha: float = 0.0

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the losses and the objectives."""
        rest = complement(self.alpha)
        for owner in (o.name for o in local_modules(ir)):
            sims, predictions = self._similarities(ir, owner), self._predictions(ir, owner)
            terms = [weigh(ir, term, round(rest * self.beta, 12)) for term in sims]
            terms += [weigh(ir, term, round(rest * complement(self.beta), 12)) for term in predictions]
            ir.objective(owner, add_all(ir, owner, terms), self.name)

    def _similarities(self, ir: TrainingGraph, owner: str) -> list[fx.Node]:
        return [
            self._compared(ir, head, task, compare, path, "sim_loss")
            for head in (ir.nodes(owner, "sim_head") if self.beta else [])
            for task, (compare, path) in zip(ir.tasks, head.meta["compare"], strict=True)
        ]

    def _predictions(self, ir: TrainingGraph, owner: str) -> list[fx.Node]:
        found = [head_loss(ir, heads, self.loss) for heads in heads_of(ir, owner)]
        for head in ir.nodes(owner, "sign_head"):
            task, compare, path = head.meta["compare"]
            found.append(self._compared(ir, head, task, compare, path, "sign_loss"))
        return found

    @staticmethod
    def _compared(
        ir: TrainingGraph, head: fx.Node, task: Task, compare: SimilarityLoss, path: str | None, role: str
    ) -> fx.Node:
        owner = str(head.meta["owner"])
        given = [] if path is None else [ir.read(owner, path, role="projection")]
        return ir.emit(owner, compare, head, own_target(ir, owner, task), *given, role=role, spec=ir.scalar)

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


def projection(
    ir: TrainingGraph, owner: str, task: int, loss: SimilarityLoss, size: int | None
) -> str | None:
    """Return the path of the fixed random matrix [size,C] of a module's labels for a task."""
    if size is None:
        return None
    name = f"{owner}_projection".replace(".", "_") + (f"_{task}" if task else "")
    if name not in ir.root.aux:
        source, result = (TensorSpec((BatchDim(), n), loss.output.dtype) for n in (loss.classes, size))
        ir.add_module(name, build(partial(build_head, kind="fixed"), owner, source, result))
    return f"aux.{name}.weight"


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

    def __call__(self, z: Tensor, target: Tensor, projection: Tensor | None = None) -> Tensor:
        """Return the loss, shape [], for `z` as a similarity head gives it and the user's target.

        Args:
            z: [B,D] or [B,D,*positions].
            target: the user's.
            projection: [N,C], by which labels are multiplied before they are compared.
        """
        y = self.labels(target)
        if projection is not None:
            y = y.to(projection.dtype) @ projection.t()
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


class SignLoss(SimilarityLoss):
    """The loss of (scores, target, P): binary cross-entropy of [P y > 0], y the labels as vectors."""

    def __init__(self, plan: Readout, output: TensorSpec) -> None:
        super().__init__(plan, output)
        self.__name__ = self.__qualname__ = "sign_loss"

    def __call__(self, z: Tensor, target: Tensor, projection: Tensor | None = None) -> Tensor:
        """Return the loss, shape [], a mean over the samples (or tokens) that have a label.

        Args:
            z: scores in the shape of the output, with N for its classes.
            target: the user's.
            projection: P [N,C].
        """
        assert projection is not None
        scores, y = self.plan.rows_of(z), self.labels(target)
        signs = (y.to(projection.dtype) @ projection.t() > 0).to(scores.dtype)
        losses = F.binary_cross_entropy_with_logits(scores, signs, reduction="none").mean(-1)
        labelled = (y != 0).any(-1).to(losses.dtype)
        return (losses * labelled).sum() / labelled.sum().clamp_min(1)
