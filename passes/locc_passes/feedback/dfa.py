"""`dfa`: direct feedback alignment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from locc.errors import MethodError, nearest
from locc.ir import Task, TensorSpec, TrainingGraph, inner
from locc.nn import BroadcastFeedback, plan_readout
from locc.rewrite import (
    Given,
    LentGradients,
    Method,
    OutputLoss,
    Pass,
    Recipe,
    add_all,
    has_rows,
    in_blocks,
    option,
    output_error,
    unreached,
)
from locc_passes.feedback.given import given_matrix
from locc_passes.feedback.published import RECIPE, advice, averaged_away
from locc_passes.feedback.zero import ZeroWeights

INITS = ("uniform", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal")


@dataclass(frozen=True)
class DirectFeedback(Pass):
    """Gives each module but the last the objective <h, B e>, with e the error at the model's output.

    e is the gradient of the user's loss with respect to the prediction (logits: before the softmax),
    batch mean included, so a learning rate means what it means for backpropagation. B [n,C] is drawn
    once from U(+-1/sqrt(n)) for every value that the module sends on; inside the module the rest is its
    own backward pass. With several tasks it is the sum over their errors, each with its own B.
    """

    init: str = "uniform"
    given: Given | None = None

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse boundaries to which no matrix leads from the output."""
        yield from unreached(ir)
        for module in ir.modules[:-1]:
            for value in taught(ir, module.name):
                if why := in_blocks(ir, value):
                    yield f"module '{module.name}': {why}"
                for task in ir.tasks:
                    try:
                        plan_readout(value.meta["spec"], task.spec)
                    except MethodError as error:
                        yield f"module '{module.name}': {error}"

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the error at the output and each module's objective."""
        if len(ir.modules) == 1:
            return
        errors = errors_of(ir)
        for module in ir.modules[:-1]:
            terms = []
            for i, value in enumerate(taught(ir, module.name)):
                delta = self.broadcast(ir, errors, value, i)
                terms.append(ir.emit(module.name, inner, value, delta, role="feedback"))
            if terms:
                ir.objective(module.name, add_all(ir, module.name, terms), "feedback")

    def broadcast(
        self, ir: TrainingGraph, errors: list[tuple[Task, fx.Node]], value: fx.Node, number: int
    ) -> fx.Node:
        """Return the sum of B e over tasks, for a value that a module sends, its `number`-th."""
        owner, sent = value.meta["owner"], []
        for i, (task, error) in enumerate(errors, start=number * len(errors)):
            name = f"feedback_{owner}" + (f"_{i}" if i else "")
            matrix = ir.add_module(name, self._feedback(owner, value.meta["spec"], task.spec))
            sent.append(ir.call(owner, matrix, ir.stop_gradient(owner, error), role="feedback"))
        return add_all(ir, owner, sent)

    def _feedback(self, owner: str, spec: TensorSpec, output: TensorSpec) -> BroadcastFeedback:
        network = BroadcastFeedback(spec, output)
        if self.init != "uniform":
            getattr(nn.init, f"{self.init}_")(network.matrix)
        if self.given is None:
            return network
        pooled = (network.readout.in_features, network.matrix.shape[1])
        network.matrix = given_matrix(self.given, owner, (spec, output), network.matrix, pooled)
        return network


def errors_of(ir: TrainingGraph) -> list[tuple[Task, fx.Node]]:
    """Return each task with the error at its prediction."""
    return [(task, output_error(ir, task)) for task in ir.tasks]


def taught(ir: TrainingGraph, owner: str) -> list[fx.Node]:
    """Return the values of a module that receive the error: those with a row for each sample."""
    return [value for value in ir.outputs(owner) if has_rows(value)]


@dataclass(frozen=True)
class DFA(Method):
    """Direct feedback alignment: every module receives the output error through its own fixed matrix.

    delta_k = (B_k e) * sigma'(a_k): injected where the module ends, so cut after the nonlinearity (and
    pooling) of each layer that shall learn from the error directly. Once e exists, all modules update
    independently of each other.
    """

    family: ClassVar[str] = "feedback"
    reference: ClassVar[str] = "Nøkland 2016"
    recipe: ClassVar[Recipe] = RECIPE

    init: str = option(
        "uniform",
        "law of the feedback matrices [n,C]: uniform (U(+-1/sqrt(n)), as published), or "
        "torch.nn.init's kaiming_ or xavier_, uniform or normal",
        choices=INITS,
    )
    feedback: Given | None = option(
        None,
        "your own matrices: a dict by module of tensors [n,C], or a factory (boundary spec, "
        "output spec[, module's name]) -> tensor",
    )
    zero_init: bool = option(
        False, "start all forward weights and biases at zero (for tanh and sigmoid networks)"
    )

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise MethodError(f"init={self.init!r}; {nearest(str(self.init), INITS)}")

    def passes(self) -> Sequence[Pass]:
        """Return the loss of the last module and the direct feedback of the others."""
        start = (ZeroWeights(),) if self.zero_init else ()
        return (*start, OutputLoss(), DirectFeedback(self.init, self.feedback), LentGradients())

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of ReLUs without normalisation, and of a mean over positions."""
        yield from advice(ir)
        yield from averaged_away(ir)
