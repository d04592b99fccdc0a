"""The training graph: nodes, ownership, the four ops, printer, invariants. Imports no other stage."""

from locc.ir.captured import Captured, Inputs, Root, Signature, SizeGuard, owned_tensor, strip
from locc.ir.coupling import Coupling
from locc.ir.graph import TrainingGraph
from locc.ir.ops import Rebuild, assign, call_with, carry, gradient, inner, objective, stop_gradient
from locc.ir.spec import BatchDim, TensorSpec
from locc.ir.tape import tape_of
from locc.ir.task import Task
from locc.ir.view import Boundary, Owner, Phase, Repeat, node_parameters, node_tensors

__all__ = [
    "BatchDim",
    "Boundary",
    "Captured",
    "Coupling",
    "Inputs",
    "Owner",
    "Phase",
    "Rebuild",
    "Repeat",
    "Root",
    "Signature",
    "SizeGuard",
    "Task",
    "TensorSpec",
    "TrainingGraph",
    "assign",
    "call_with",
    "carry",
    "gradient",
    "inner",
    "node_parameters",
    "node_tensors",
    "objective",
    "owned_tensor",
    "stop_gradient",
    "strip",
    "tape_of",
]
