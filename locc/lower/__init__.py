"""Training graph -> one program per owner, and the order in which they run."""

from locc.lower.instructions import (
    Assign,
    Backward,
    Instruction,
    Loop,
    Plan,
    Receive,
    Segment,
    Send,
    Update,
    instructions_of,
)
from locc.lower.plan import lower
from locc.lower.project import project
from locc.lower.sequential import stages

__all__ = [
    "Assign",
    "Backward",
    "Instruction",
    "Loop",
    "Plan",
    "Receive",
    "Segment",
    "Send",
    "Update",
    "instructions_of",
    "lower",
    "project",
    "stages",
]
