"""Training graph -> one program per owner, and the order in which they run."""

from locc.lower.code import Code, tracked
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
    unknown,
)
from locc.lower.plan import every_plan, lower
from locc.lower.programs import ModuleProgram, module_programs, program_of
from locc.lower.project import gathered, project
from locc.lower.resting import Resting, at_rest, runs_frozen
from locc.lower.stages import stages

__all__ = [
    "Assign",
    "Backward",
    "Code",
    "Instruction",
    "Loop",
    "ModuleProgram",
    "Plan",
    "Receive",
    "Resting",
    "Segment",
    "Send",
    "Update",
    "at_rest",
    "every_plan",
    "gathered",
    "instructions_of",
    "lower",
    "module_programs",
    "program_of",
    "project",
    "runs_frozen",
    "stages",
    "tracked",
    "unknown",
]
