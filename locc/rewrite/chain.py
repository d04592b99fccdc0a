"""Chains: gradients that the readers of a value return to the module that sent it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from locc.ir import TrainingGraph, inner, tape_of
from locc.rewrite.objectives import add_all
from locc.rewrite.passes import Pass


@dataclass(frozen=True)
class GradientChain(Pass):
    """Gives each module the objective sum <h, sg[gradient of the readers' objectives with respect to h]>.

    The sum runs over every value that the module sends to others, and over every reader of it. With
    ordinary layers inside the modules this chain is backpropagation; with feedback layers it is
    feedback alignment. A frozen module hands the gradient on to those before it. Needs the objectives of
    the readers, so it walks from the last module down.
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the objectives from the last module but one down to the first."""
        learning = [not ir.frozen(module.name) for module in ir.modules]
        for module in reversed(ir.modules[:-1]):
            if not any(learning[: module.index + 1]):
                break  # nothing here or before it would use the gradient
            terms = [
                t for value in ir.crossing(module.name) for t in handed_down(ir, module.name, value, "chain")
            ]
            if terms:
                ir.objective(module.name, add_all(ir, module.name, terms), "chain")


def returning(
    ir: TrainingGraph, value: fx.Node, instead: Mapping[fx.Node, fx.Node] | None = None
) -> list[fx.Node]:
    """Return the gradients that the modules which read a value have with respect to it.

    One gradient node for each objective of a reader that depends on the value; each belongs to the reader and
    has the value's shape. The readers must have their objectives by then. Empty where none depends on it.

    Args:
        ir: the training graph.
        value: what a module sends.
        instead: objective -> the scalar of its owner whose gradient is taken in the place of the objective's.
    """
    found = []
    for boundary in ir.boundaries(producer=value.meta["owner"]):
        if boundary.value is value:
            for objective in ir.objectives(boundary.consumer):
                scalar = (instead or {}).get(objective, objective.all_input_nodes[0])
                if boundary.entry in tape_of(scalar):
                    found.append(ir.gradient(scalar, boundary.entry))
    return found


def handed_down(ir: TrainingGraph, owner: str, value: fx.Node, role: str) -> list[fx.Node]:
    """Return <value, sg[gradient]> (shape []) for each gradient that `returning` finds for a value.

    As terms of an objective of `owner`, whose value it is, they give it exactly these gradients.
    """
    return [
        ir.emit(owner, inner, value, ir.stop_gradient(owner, gradient), role=role)
        for gradient in returning(ir, value)
    ]
