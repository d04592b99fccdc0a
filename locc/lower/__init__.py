"""Training graph -> one program per owner, and the order in which they run."""

from locc.lower.plan import Backward, Instruction, Loop, Plan, Segment, Update, lower
from locc.lower.stages import stages

__all__ = ["Backward", "Instruction", "Loop", "Plan", "Segment", "Update", "lower", "stages"]
