"""What compilation yields once example inputs are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from locc.facts import Certificate
from locc.ir import Phase, TrainingGraph
from locc.ir.state import State, states
from locc.lower import ModuleProgram, Plan
from locc.runtime.executor import Executor
from locc.runtime.fingerprint import Fingerprint
from locc.runtime.grouped import Groups
from locc.runtime.learner import Learner
from locc.runtime.replay import Workers
from locc.runtime.stacked import Diagonal


@dataclass
class Built:
    """What compilation yields once example inputs are known.

    `misfit` returns a sentence for a target that method or loss cannot read, in a batch of that size;
    `loss` tells the user's loss from others; `training` says by which optimizers it trains, `advice` why it
    may do so badly, `asked` what was asked for and the graph does not tell, by "method", "options", "splits".
    """

    ir: TrainingGraph
    certificate: Certificate | None
    learners: dict[str, Learner]
    schedulers: dict[str, Any]
    executor: Executor
    phases: tuple[Phase, ...]
    misfit: Callable[[Any, int], str | None]
    loss: Fingerprint
    training: str = ""
    advice: tuple[str, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict)
    plans: dict[str | None, Plan] = field(default_factory=dict)
    parts: dict[str | None, list[ModuleProgram]] = field(default_factory=dict)
    shares: dict[str | None, Plan] = field(default_factory=dict)
    workers: dict[str | None, Workers] = field(default_factory=dict)
    diagonals: dict[str | None, Diagonal] = field(default_factory=dict)
    groups: dict[str | None, Groups] = field(default_factory=dict)
    resting: dict[str, list[nn.Module]] = field(default_factory=dict)

    @cached_property
    def states(self) -> list[State]:
        """What lives across steps; a walk over the modules finds it, which a step would spend on nothing."""
        return [state for _, state in states(self.ir.root)]
