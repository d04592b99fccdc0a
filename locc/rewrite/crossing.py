"""Crossings: which values modules send, and what comes back for those that are no activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from locc.ir import Boundary, TrainingGraph
from locc.rewrite.chain import handed_down
from locc.rewrite.objectives import add_all
from locc.rewrite.passes import Pass


def activations(ir: TrainingGraph, owner: str) -> list[fx.Node]:
    """Return the differentiable values that a module sends and that have a row for each sample.

    Left out are borrowed parameters and values computed from parameters alone (a table of position biases).
    """
    return [value for value in ir.crossing(owner) if has_rows(value)]


def has_rows(value: fx.Node) -> bool:
    """Whether a value that crosses a cut, or its entry, has a dimension that grows with the batch.

    A borrowed parameter has none, nor has a value that is computed from parameters alone.
    """
    return value.op != "get_attr" and value.meta["spec"].batch_dim is not None


def rows(value: fx.Node) -> int:
    """Return the dimension of a value in which its rows are; the value must have them, see `has_rows`."""
    dim = value.meta["spec"].batch_dim
    assert isinstance(dim, int)
    return dim


def read_by(ir: TrainingGraph, module: str) -> list[Boundary]:
    """Return the boundaries by which a module reads activations: differentiable, a row for each sample."""
    return [b for b in ir.boundaries(consumer=module) if b.differentiable and has_rows(b.value)]


def unreached(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for each module but the last that sends nothing differentiable, for `requires`."""
    for module in ir.modules[:-1]:
        if not ir.crossing(module.name):
            yield (
                f"module '{module.name}' sends no floating-point value to a later one, so nothing would "
                "train it; move the split to where it does"
            )


@dataclass(frozen=True)
class LentGradients(Pass):
    """Gives a module the readers' own gradients for what it lends them without a row for each sample.

    That is a parameter under `tied="owner"`, or a value computed from parameters alone: no target and no
    prediction exists for it, so it receives the gradient of each reader's local objective, as
    <value, sg[gradient]>. Runs after the passes that give the readers their objectives.
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the objectives, from the last module but one down to the first."""
        for module in reversed(ir.modules[:-1]):
            lent = [value for value in ir.crossing(module.name) if not has_rows(value)]
            terms = [t for value in lent for t in handed_down(ir, module.name, value, "lent")]
            if terms:
                ir.objective(module.name, add_all(ir, module.name, terms), "lent")
