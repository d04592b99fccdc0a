"""The assertions that a lowered plan, and the programs that it is cut into, compute what the graph means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from locc.lower import ModuleProgram, Plan
from locc.program import Program

from .beside import run_beside
from .reference import reference_step
from .trial import Holdings, State, Trial, batch_of, difference, untouched

TOLERANCE = 1e-12
"""Largest difference of a float64 value, in units of the largest entry of its tensor or of one."""


def assert_lowered(
    program: Program, x: Any, y: Any = None, *, steps: int = 2, plan: Plan | None = None
) -> None:
    """Assert that the plan of the current phase trains as `reference_step` does, which knows no plans.

    Compares parameters, buffers, state, optimizer state and objectives after some steps: float64 values to
    1e-12 of the largest entry, other floating-point values to the precision of their dtype, the rest exactly.
    The program is as it was afterwards.

    Example:
        >>> program = locc.compile(model.double(), "dtp", splits=["layer1"], example_inputs=x.double())
        >>> locc.testing.assert_lowered(program, x.double(), y)

    Args:
        program: a compiled program.
        x: a batch as `step` takes it.
        y: its target; without one, a few samples of `x` with a made-up target are used.
        steps: how many.
        plan: another plan of the same graph, instead of the program's.

    Raises:
        AssertionError: names the first tensor that differs, and the module that owns it.
        RunError: an objective is not finite.
    """
    values = batch_of(program, x, y)
    plan = program.plan(program.phase) if plan is None else plan
    with untouched(program):
        trial = Trial(program, guarded=True)
        found = _states(program, [trial.run(plan, values, i) for i in range(steps)])
    with untouched(program):
        done = [reference_step(program, tuple(values[:-1]), values[-1]).objectives for _ in range(steps)]
        wanted = _states(program, done)
    for owner in wanted:
        different = difference(wanted[owner], found[owner], _close)
        if different is not None:
            raise AssertionError(
                f"the plan of method '{program.method}'{_phase(program)} does not compute what its graph "
                f"means: {different} of '{owner}' comes out different after {steps} steps of reference_step\n"
                "  remedy: compare print(program.plan()) with print(program.ir); something runs too early, "
                "twice or not at all"
            )


def assert_side_by_side(
    program: Program,
    batches: Iterable[tuple[Any, Any]],
    *,
    programs: Mapping[str, ModuleProgram] | None = None,
) -> None:
    """Assert that the module programs, run side by side in threads, train the same bits as `program.step`.

    The program is as it was afterwards.

    Example:
        >>> locc.testing.assert_side_by_side(program, [(x1, y1), (x2, y2)])

    Args:
        program: a compiled program.
        batches: (x, y) pairs as `step` takes them.
        programs: other module programs of the same plan, instead of the program's.

    Raises:
        AssertionError: names the first tensor that differs and its module, or the program that fails.
    """
    values = [program.bind(x, y) for x, y in batches]
    plan = program.plan(program.phase)
    with untouched(program):
        trial = Trial(program, guarded=True)
        wanted = _states(program, [trial.run(plan, batch, i) for i, batch in enumerate(values)])
    with untouched(program), program.frozen():
        found = _states(program, run_beside(program, values, programs))
    for owner in wanted:
        different = difference(wanted[owner], found[owner])
        if different is not None:
            raise AssertionError(
                f"the module programs of method '{program.method}'{_phase(program)}, run side by side, do "
                f"not train as program.step does: {different} of '{owner}' comes out different"
            )


def _phase(program: Program) -> str:
    return f" in phase '{program.phase}'" if program.phase is not None else ""


def _states(program: Program, objectives: list[dict[str, Tensor]]) -> dict[str, State]:
    holdings = Holdings(program)
    return {owner: holdings.state(owner, objectives) for owner in program.ir.owners}


def _close(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    precision = torch.finfo(one.dtype).eps * 2**12
    scale = max(1.0, float(one.abs().nan_to_num().max()) if one.numel() else 0.0)
    rate = TOLERANCE if one.dtype == torch.float64 else precision
    return torch.allclose(one, other, rtol=0.0, atol=rate * scale, equal_nan=True)
