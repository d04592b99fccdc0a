"""Runs compiled programs."""

from locc.runtime.built import Built
from locc.runtime.executor import Executor
from locc.runtime.learner import Learner
from locc.runtime.machine import Machine
from locc.runtime.program import Compiled, checked
from locc.runtime.report import StepReport
from locc.runtime.settings import Settings

__all__ = ["Built", "Compiled", "Executor", "Learner", "Machine", "Settings", "StepReport", "checked"]
