"""Runs compiled programs."""

from locc.runtime.executor import Executor
from locc.runtime.learner import Learner
from locc.runtime.machine import Machine
from locc.runtime.program import Built, Program, StepReport, checked
from locc.runtime.settings import Settings

__all__ = ["Built", "Executor", "Learner", "Machine", "Program", "Settings", "StepReport", "checked"]
