"""What the proxy methods share: terms of local objectives, and training in stages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor, fx, nn

from locc.ir import Phase, TrainingGraph
from locc.rewrite import (
    AttachHeads,
    LossLike,
    Pass,
    add_all,
    blocked,
    build,
    divided,
    head_loss,
    layout_at,
    local_modules,
    local_values,
    own_target,
    prediction_spec,
    spec_of,
    untrained,
    weigh,
)


@dataclass(frozen=True)
class LocalTerm(Pass):
    """Gives each module but the last an objective: the sum of one term for each of its outputs.

    A subclass says what the term of a value is. A module in which the term has no weight gets none.

    Attributes:
        name: of the objective.
        weights: of the term in the first module, and in the last but one; linear between them. Two modules
            have one local objective, with the first.
        undropped: read a value before the dropout that ends its module.
    """

    single: ClassVar[bool] = False
    """The term reads the target of a single prediction."""

    name: str = "term"
    weights: tuple[float, float] = (1.0, 1.0)
    undropped: bool = field(default=False, kw_only=True)

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Every module but the last sends a value that it can train on, and that the term can read."""
        if self.single:
            yield from divided(ir)
        yield from untrained(ir)
        yield from blocked(ir)
        for owner, value in local_values(ir, undropped=False):
            reason = self.refusal(ir, value)
            if reason:
                yield f"module '{owner}': {reason}"

    def refusal(self, ir: TrainingGraph, value: fx.Node) -> str | None:
        """Say why a value has no such term, if it has none."""
        return None

    @abstractmethod
    def term(self, ir: TrainingGraph, owner: str, value: fx.Node) -> fx.Node | None:
        """Return the term of a value, a node of its owner of shape []; None if it has none."""

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the terms and the objectives."""
        owners = [owner.name for owner in local_modules(ir)]
        for index, owner in enumerate(owners):
            weight = between(self.weights, index, len(owners))
            if weight:
                values = [value for name, value in local_values(ir, self.undropped) if name == owner]
                terms = [term for value in values if (term := self.term(ir, owner, value)) is not None]
                if terms:
                    ir.objective(owner, weigh(ir, add_all(ir, owner, terms), weight), self.name)

    def network(
        self,
        ir: TrainingGraph,
        owner: str,
        value: fx.Node,
        made: Callable[..., nn.Module],
    ) -> fx.Node:
        """Return the result of an auxiliary network of a value; `made` takes (boundary, output, layout=)."""
        make = partial(made, layout=layout_at(ir, value))
        network = build(make, owner, spec_of(value), ir.tasks[0].spec)
        path = ir.add_module(f"{owner}_{self.name}_{value.name}", network)
        return ir.call(owner, path, value, role=self.name)


@dataclass(frozen=True)
class HeadTerm(LocalTerm):
    """The user's loss, or another, of auxiliary heads."""

    name: str = "head"
    heads: AttachHeads = field(default_factory=AttachHeads)
    loss: LossLike | None = field(default=None)

    def term(self, ir: TrainingGraph, owner: str, value: fx.Node) -> fx.Node:
        """Return the loss of the results of a head for each task."""
        return head_loss(ir, self.heads.attach(ir, owner, value), self.loss)


@dataclass(frozen=True)
class PairTerm(LocalTerm):
    """A loss of a value and the class ids of its batch, without a network."""

    single: ClassVar[bool] = True

    @abstractmethod
    def loss(self, ir: TrainingGraph, value: fx.Node) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of (value [B,...], class ids [B]) -> shape []."""

    def refusal(self, ir: TrainingGraph, value: fx.Node) -> str | None:
        """Each sample has one row and one label."""
        return one_label_a_row(ir, value)

    def term(self, ir: TrainingGraph, owner: str, value: fx.Node) -> fx.Node:
        """Return the loss."""
        return ir.emit(
            owner, self.loss(ir, value), value, own_target(ir, owner), role="pairs", spec=ir.scalar
        )


@dataclass(frozen=True)
class Stages(Pass):
    """Trains the modules one after the other: those before are frozen, those after wait."""

    def rewrite(self, ir: TrainingGraph) -> None:
        """Declare one stage for each module that trains."""
        names = [module.name for module in ir.modules if not ir.frozen(module.name)]
        ir.phases = tuple(Phase(f"train_{name}", (name,), stage=stage) for stage, name in enumerate(names))

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Every module that trains has a stage."""
        staged = {name for phase in ir.phases for name in phase.trains}
        yield from (f"module '{m.name}' has no stage" for m in local_modules(ir) if m.name not in staged)


def one_label_a_row(ir: TrainingGraph, value: fx.Node) -> str | None:
    """Say why the rows of a value are no samples of one class each, if they are not."""
    output, spec = prediction_spec(ir), spec_of(value)
    if len(output.shape) != 2 or output.batch_dim != 0:
        return (
            f"the model predicts {output}, and samples are compared by one class each; use a method that "
            "leaves the target to the loss, such as 'dgl'"
        )
    if spec.batch_dim != 0 or spec.shape[0] != output.shape[0]:
        return f"its output {spec} has not one row for each sample of {output}; cut where it has"
    return None


def between(ends: tuple[float, float], index: int, count: int) -> float:
    """Return the value at `index` of `count` points on the line between two ends."""
    first, last = ends
    return first if count < 2 else first + (last - first) * index / (count - 1)
