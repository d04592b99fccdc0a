"""locc: a compiler for local learning, training neural networks without end-to-end backpropagation."""

from locc.compiler import compile
from locc.errors import (
    CaptureError,
    CheckpointError,
    ExportError,
    GraphError,
    LocalityError,
    LoccError,
    MethodError,
    RunError,
    SplitError,
)
from locc.examine import Examination, examine
from locc.markers import split
from locc.registry import method, methods
from locc.rewrite import Method, Pass
from locc.runtime import Program, StepReport
from locc.verify import Certificate, verify

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Certificate",
    "CheckpointError",
    "Examination",
    "ExportError",
    "GraphError",
    "LocalityError",
    "LoccError",
    "Method",
    "MethodError",
    "Pass",
    "Program",
    "RunError",
    "SplitError",
    "StepReport",
    "compile",
    "examine",
    "method",
    "methods",
    "split",
    "verify",
]
