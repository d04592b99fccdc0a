"""Runs compiled programs."""

from locc.runtime.executor import Executor

# Imported now rather than at the first fit: rich draws from Python's generator, which may be seeded by then.
from locc.runtime.fit import Epoch, Evaluation, History
from locc.runtime.learner import Learner
from locc.runtime.machine import Machine
from locc.runtime.program import Built, Program, StepReport, checked
from locc.runtime.settings import Settings

__all__ = [
    "Built",
    "Epoch",
    "Evaluation",
    "Executor",
    "History",
    "Learner",
    "Machine",
    "Program",
    "Settings",
    "StepReport",
    "checked",
]
