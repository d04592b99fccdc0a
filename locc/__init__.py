"""locc: a compiler for local learning, training neural networks without end-to-end backpropagation."""

from locc.catalogue import methods
from locc.compiler import compile
from locc.errors import (
    CaptureError,
    CheckpointError,
    ExportError,
    GraphError,
    LocalityError,
    LoccError,
    LoccWarning,
    MethodError,
    RunError,
    SplitError,
)
from locc.examine import Examination, examine
from locc.markers import split
from locc.program import Program
from locc.recipes import OptimizerSpec, Recipe
from locc.registry import method
from locc.rewrite import Method, Pass
from locc.runtime import StepReport
from locc.verify import Certificate, verify
from locc.version import __version__

__all__ = [
    "CaptureError",
    "Certificate",
    "CheckpointError",
    "Examination",
    "ExportError",
    "GraphError",
    "LocalityError",
    "LoccError",
    "LoccWarning",
    "Method",
    "MethodError",
    "OptimizerSpec",
    "Pass",
    "Program",
    "Recipe",
    "RunError",
    "SplitError",
    "StepReport",
    "__version__",
    "compile",
    "examine",
    "method",
    "methods",
    "split",
    "verify",
]
