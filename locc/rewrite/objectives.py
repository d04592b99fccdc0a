"""The terms of an objective: distances, weights and sums of 0-d values, in their owner's program."""

from __future__ import annotations

import operator

from torch import Tensor, fx

from locc.ir import TrainingGraph


def add_all(ir: TrainingGraph, owner: str, terms: list[fx.Node]) -> fx.Node:
    """Return the sum of one or more nodes of shape [] that belong to `owner`, in its program."""
    total = terms[0]
    for term in terms[1:]:
        total = ir.emit(owner, operator.add, total, term, role="chain")
    return total


def weigh(ir: TrainingGraph, term: fx.Node, weight: float) -> fx.Node:
    """Return `weight` times a node of shape [], in the program of the node's owner; the node itself for 1."""
    if weight == 1:
        return term
    return ir.emit(str(term.meta["owner"]), operator.mul, term, weight, role="weighted")


def judged(node: fx.Node, fails: str, remedy: str) -> fx.Node:
    """Mark a distance of what an auxiliary gives to what it should, and return it.

    `Program.diagnose` reports the distance of the node's first argument to its second, in units of the
    second's spread, and where it is too large, that the auxiliary `fails` and what the `remedy` is.
    """
    node.meta["judged"] = (fails, remedy)
    return node


def squared_distance(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
    """Return ||a - b||^2 summed over units, mean over the rows along `dim` (shape [])."""
    return (a - b).square().sum() / a.shape[dim]
