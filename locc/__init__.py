"""locc: a compiler for local learning, training neural networks without end-to-end backpropagation."""

from typing import TYPE_CHECKING

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
from locc.lazy import lazily
from locc.version import __version__

if TYPE_CHECKING:
    from locc.budget import fit
    from locc.catalogue import methods
    from locc.compiler import compile
    from locc.examination import Examination, examine
    from locc.files import deferred
    from locc.markers import split
    from locc.program import Program
    from locc.proof import Certificate, verify
    from locc.recipes import OptimizerSpec, Recipe
    from locc.registry import method
    from locc.rewrite import Method, Pass
    from locc.runtime import StepReport
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Certificate": "locc.proof",
            "Examination": "locc.examination",
            "Method": "locc.rewrite",
            "OptimizerSpec": "locc.recipes",
            "Pass": "locc.rewrite",
            "Program": "locc.program",
            "Recipe": "locc.recipes",
            "StepReport": "locc.runtime",
            "compile": "locc.compiler",
            "deferred": "locc.files",
            "examine": "locc.examination",
            "fit": "locc.budget",
            "method": "locc.registry",
            "methods": "locc.catalogue",
            "split": "locc.markers",
            "verify": "locc.proof",
        },
    )

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
    "deferred",
    "examine",
    "fit",
    "method",
    "methods",
    "split",
    "verify",
]
