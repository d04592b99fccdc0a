"""Updates within the backward pass: where they are the same as updates after it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from locc.errors import MethodError
from locc.ir import Phase, TrainingGraph
from locc.lower import Backward, Plan, Update, every_plan, instructions_of


def check(ir: TrainingGraph, phases: Iterable[Phase], name: str) -> None:
    """Refuse a program in which something runs between a backward pass and the update that it leads to.

    Raises:
        MethodError: names the module.
    """
    for plan in every_plan(ir, phases):
        _check(plan, name)


def _check(plan: Plan, name: str) -> None:
    before = {id(update): one for one, update in pairwise(plan.instructions)}
    backwards = [b for b in instructions_of(plan.instructions) if isinstance(b, Backward) and b.objectives]
    for update in (i for i in plan.instructions if isinstance(i, Update)):
        passes = [b for b in backwards if b.owner == update.owner]
        if len(passes) == 1 and before[id(update)] is passes[0]:
            continue
        why = f"it has {len(passes)} objectives, whose gradients add up"
        if len(passes) == 1:
            why = "its parameters, as they were before the step, are read once more after its backward pass"
        raise MethodError(
            f"update='in_backward' changes a parameter before the backward pass is over, and with method "
            f"'{name}' module '{update.owner}' has to wait: {why}; use update='after_backward'"
        )
