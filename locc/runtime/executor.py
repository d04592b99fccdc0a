"""Runs the steps of a program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from locc.lower import Plan
from locc.runtime.backends import BACKENDS
from locc.runtime.context import Context
from locc.runtime.machine import Channels
from locc.runtime.recompute import recomputed, replaced
from locc.runtime.stops import explained
from locc.runtime.streams import preserved_rng
from locc.runtime.within import weight_first


@dataclass
class Executor(Context):
    """Runs steps of a plan, or of the programs that it is cut into."""

    backend: str = "eager"

    def run(
        self,
        plan: Plan,
        values: Iterable[Any],
        step: int,
        channels: Channels | None = None,
        moved: list[str] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Run one step.

        Args:
            plan: a whole plan, or the program of some owners.
            values: of the plan's inputs.
            step: its number, on which random streams depend.
            channels: to the programs of the other owners.
            moved: the owners that other programs of these steps have updated; this adds its own.

        Returns:
            The objectives by name and the loss, 0-d tensors that are not synchronised.

        Raises:
            RunError: an objective is not finite; no parameter of its owner has changed. Or PyTorch refuses
                the batch. The message says which modules were updated before that.
        """
        self.raise_deferred(step)
        machine = BACKENDS[self.backend](self, plan, values, step, channels)
        machine.moved = machine.moved if moved is None else moved
        try:
            with (
                preserved_rng(self.device),
                replaced(() if machine.apart else self.linear, weight_first),
                recomputed(self.recompute),
            ):
                machine.run(plan.instructions)
        except BaseException as error:
            for learner in self.learners.values():
                learner.clear()
            told = explained(error, machine.at, plan.instructions, machine.account())
            if told is error:
                raise
            raise told from error
        return machine.objectives, machine.loss
