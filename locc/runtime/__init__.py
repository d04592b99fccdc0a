"""Runs compiled programs."""

from locc.runtime.executor import Executor, Learner
from locc.runtime.program import Built, Program, StepReport, checked
from locc.runtime.settings import Settings

__all__ = ["Built", "Executor", "Learner", "Program", "Settings", "StepReport", "checked"]
