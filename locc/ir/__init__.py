"""The training graph: nodes, ownership, the four ops, printer, invariants. Imports no other stage."""

from locc.ir.captured import BatchGuard, Captured, Inputs, Root, Signature
from locc.ir.coupling import Coupling
from locc.ir.graph import TrainingGraph
from locc.ir.ops import assign, gradient, inner, objective, stop_gradient
from locc.ir.spec import BatchDim, TensorSpec
from locc.ir.view import Boundary, Owner, Phase, Repeat, carry

__all__ = [
    "BatchDim",
    "BatchGuard",
    "Boundary",
    "Captured",
    "Coupling",
    "Inputs",
    "Owner",
    "Phase",
    "Repeat",
    "Root",
    "Signature",
    "TensorSpec",
    "TrainingGraph",
    "assign",
    "carry",
    "gradient",
    "inner",
    "objective",
    "stop_gradient",
]
