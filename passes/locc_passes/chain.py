"""Passes that several families share: the loss at the output, and gradients handed down a chain."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from locc.ir import TrainingGraph, inner
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
            terms = [t for value in ir.crossing(module.name) for t in self._terms(ir, module.name, value)]
            if terms:
                ir.objective(module.name, add_all(ir, module.name, terms), "chain")

    @staticmethod
    def _terms(ir: TrainingGraph, owner: str, value: fx.Node) -> list[fx.Node]:
        terms = []
        for boundary in ir.boundaries(producer=owner):
            if boundary.value is value:
                for objective in ir.objectives(boundary.consumer):
                    scalar = objective.args[0]
                    assert isinstance(scalar, fx.Node)
                    arriving = ir.stop_gradient(owner, ir.gradient(scalar, boundary.entry))
                    terms.append(ir.emit(owner, inner, value, arriving, role="chain"))
        return terms


def add_all(ir: TrainingGraph, owner: str, terms: list[fx.Node]) -> fx.Node:
    """Return the sum of 0-d nodes of one owner."""
    total = terms[0]
    for term in terms[1:]:
        total = ir.emit(owner, operator.add, total, term, role="chain")
    return total
