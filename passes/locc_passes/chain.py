"""Passes that several families share: the loss at the output, and gradients handed down a chain."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from locc.ir import TrainingGraph, inner
from locc.ir.tape import tape_of
from locc.rewrite import Pass


@dataclass(frozen=True)
class OutputLoss(Pass):
    """Gives the last module the user's loss as its objective."""

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the loss and its objective."""
        ir.objective(ir.last.name, ir.apply_loss(), "loss")


@dataclass(frozen=True)
class GradientChain(Pass):
    """Gives each module the objective sum <h, sg[gradient of the readers' objectives with respect to h]>.

    The sum runs over every value that the module sends to others, and over every reader of it. With
    ordinary layers inside the modules this chain is backpropagation; with feedback layers it is
    feedback alignment. Needs the objectives of the readers, so it walks from the last module down.
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the objectives from the last module but one down to the first."""
        for module in reversed(ir.modules[:-1]):
            terms = [
                t for value in ir.crossing(module.name) for t in handed_down(ir, module.name, value, "chain")
            ]
            if terms:
                ir.objective(module.name, add_all(ir, module.name, terms), "chain")


def returning(ir: TrainingGraph, value: fx.Node) -> list[fx.Node]:
    """Return the gradients of the readers' objectives with respect to a value that they depend on."""
    found = []
    for boundary in ir.boundaries(producer=value.meta["owner"]):
        if boundary.value is value:
            for objective in ir.objectives(boundary.consumer):
                scalar = objective.args[0]
                assert isinstance(scalar, fx.Node)
                if boundary.entry in tape_of(scalar):
                    found.append(ir.gradient(scalar, boundary.entry))
    return found


def handed_down(ir: TrainingGraph, owner: str, value: fx.Node, role: str) -> list[fx.Node]:
    """Return <value, sg[gradient]> for each gradient that the readers of a value return to its owner."""
    return [
        ir.emit(owner, inner, value, ir.stop_gradient(owner, gradient), role=role)
        for gradient in returning(ir, value)
    ]


def add_all(ir: TrainingGraph, owner: str, terms: list[fx.Node]) -> fx.Node:
    """Return the sum of 0-d nodes of one owner."""
    total = terms[0]
    for term in terms[1:]:
        total = ir.emit(owner, operator.add, total, term, role="chain")
    return total
