"""The assertions that a lowered plan, and the programs that it is cut into, compute what the graph means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from locc.errors import LoccError
from locc.ir import gradient, stop_gradient
from locc.lower import Backward, ModuleProgram, Plan, Segment, instructions_of
from locc.program import Program
from locc.runtime import StepReport, checked
from locc.runtime.streams import of_backward
from locc.runtime.untouched import untouched

from .beside import run_beside
from .reference import reference_values
from .trial import Holdings, State, Trial, batch_of, difference, first_line, twin, unit

TOLERANCE = 1e-12
"""Largest difference of a float64 value, in units of the largest entry of its tensor."""


def assert_lowered(
    program: Program, x: Any, y: Any = None, *, steps: int | None = None, plan: Plan | None = None
) -> None:
    """Assert that the plan of the current phase trains as `reference_step` does, which knows no plans.

    Compares parameters, buffers, state, optimizer state, objectives and loss after each step, bit for bit.
    Only where three gradients or more are added up in another order than the graph has, and so may round in
    another way, float64 values agree to 1e-12 of the largest entry, other floating-point values to the
    precision of their dtype. The program is as it was afterwards.

    Example:
        >>> program = locc.compile(model.double(), "dtp", splits=["layer1"], example_inputs=x.double())
        >>> locc.testing.assert_lowered(program, x.double(), y)

    Args:
        program: a compiled program.
        x: a batch as `step` takes it.
        y: its target; without one, a few samples of `x` with a made-up target are used.
        steps: how many; one more than it takes until every owner has made an update without it.
        plan: another plan of the same graph, instead of the program's.

    Raises:
        AssertionError: names the first tensor that differs, and the module that owns it; or the plan fails.
        RunError: an objective is not finite.
    """
    checked(program).complete(x)
    plan = program.plan(program.phase) if plan is None else plan
    count = 1 + unit(program, plan) if steps is None else steps
    trial = Trial(program, guarded=True)

    def meant(values: list[Any], number: int) -> StepReport:
        return reference_values(program, twin(values))

    def planned(values: list[Any], number: int) -> StepReport:
        return trial.report(plan, values, number)

    def after_each(step: Callable[[list[Any], int], StepReport]) -> list[State]:
        with untouched(program):
            values = batch_of(program, x, y)
            return [_state(program, [step(values, number)]) for number in range(count)]

    wanted = after_each(meant)
    try:
        found = after_each(planned)
    except LoccError:
        raise
    except Exception as error:  # the reference has run the same code of the user's
        raise AssertionError(f"the plan of {_named(program)} fails: {first_line(error)}") from error
    for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
        different = difference(one, other)
        if different is not None and _regrouped(program, plan):
            different = difference(one, other, _close)
        if different is None:
            continue
        raise AssertionError(
            f"the plan of {_named(program)} does not compute what its graph means: {different} is not that "
            f"of reference_step after step {number + 1}\n"
            "  remedy: compare print(program.plan()) with print(program.ir): something runs too early, "
            "twice or not at all, or the model's code keeps what no buffer holds"
        )


def assert_side_by_side(
    program: Program,
    batches: Iterable[tuple[Any, Any]],
    *,
    programs: Mapping[str, ModuleProgram] | None = None,
) -> None:
    """Assert that the module programs, run side by side in threads, train the same bits as `program.step`.

    Each runs as far ahead of the others as it can. The program is as it was afterwards.

    Example:
        >>> locc.testing.assert_side_by_side(program, [(x1, y1), (x2, y2)])

    Args:
        program: a compiled program.
        batches: (x, y) pairs as `step` takes them.
        programs: other module programs of the same plan, instead of the program's.

    Raises:
        AssertionError: names the first tensor that differs and its module, or the program that fails.
        LoccError: there is no batch.
    """
    pairs = list(batches)
    if not pairs:
        raise LoccError(
            "assert_side_by_side(program, batches): no batch was given; give one or more, [(x, y)]"
        )
    checked(program).complete(pairs[0][0])
    plan = program.plan(program.phase)
    with untouched(program):
        values = [program.bind(x, y) for x, y in pairs]
        trial = Trial(program, guarded=True)
        wanted = _state(program, [trial.report(plan, batch, i) for i, batch in enumerate(values)])
    with untouched(program), program.in_phase():
        values = [program.bind(x, y) for x, y in pairs]
        found = _state(program, run_beside(program, values, programs))
    different = difference(wanted, found)
    if different is not None:
        raise AssertionError(
            f"the module programs of {_named(program)}, run side by side, do not train as program.step "
            f"does: {different} comes out different\n"
            "  remedy: find what a module reads beside what it receives (print(program.module_programs)); "
            "locc.testing.assert_isolated(program, x, y) names it"
        )


def _named(program: Program) -> str:
    phase = f" in phase '{program.phase}'" if program.phase is not None else ""
    return f"method '{program.method}'{phase}"


def _state(program: Program, reports: list[StepReport]) -> State:
    """Return all that every owner holds, and what the steps have reported."""
    holdings, objectives = Holdings(program), [report.objectives for report in reports]
    found: State = {}
    for owner in program.ir.owners:
        held = holdings.state(owner, objectives)
        found.update((f"{name} of '{owner}'", value) for name, value in held.items())
    for step, report in enumerate(reports):
        if report.network_loss is not None:
            found["the loss" + (f" of step {step + 1}" if step else "")] = report.network_loss
    return found


def _regrouped(program: Program, plan: Plan) -> bool:
    """Whether three gradients or more are added up in another order than the graph has."""
    place: dict[str, int] = {}
    for i in instructions_of(plan.instructions):
        ran = [line.partition(" = ")[0] for line in i.text] if isinstance(i, Segment) else []
        for name in [of_backward(i.scalar)] if isinstance(i, Backward) else ran:
            place.setdefault(name, len(place))
    nodes = [n for n in program.ir.graph.nodes if n.target not in (stop_gradient, gradient)]
    modules = dict.fromkeys(n.target for n in nodes if n.op == "call_module")
    sums = [[n.name for n in nodes if n in value.users] for value in nodes]
    sums += [[n.name for n in nodes if n.op == "call_module" and n.target == path] for path in modules]
    for owner in program.ir.owners:
        sums.append([of_backward(n.all_input_nodes[0].name) for n in program.ir.objectives(owner)])
    orders = [[place[name] for name in names if name in place] for names in sums]
    return any(len(order) > 2 and order != sorted(order) for order in orders)


def _close(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    eps = torch.finfo(one.dtype).eps
    rate = TOLERANCE if one.dtype == torch.float64 else 2**12 * eps
    scale = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=rate * scale + 16 * eps, equal_nan=True)
