"""What the assertions say of a plan, or a module program, that does not compute what the graph means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from locc import Program
from locc.errors import LoccError
from locc.ir import TrainingGraph, inner
from locc.lower import Assign, Backward, Instruction, Plan, Segment, Send, Update
from locc.runtime.untouched import untouched
from locc.testing import Case, ModelSpec, assert_lowered, assert_side_by_side
from locc.testing.trial import Trial, batch_of

from .two_weights import Rewrite, X, Y, chained, hidden, kept, model, program, rounds, three, weights

Change = Callable[[list[Instruction]], list[Instruction]]


def planned(found: Program, change: Change) -> Plan:
    """Return the program's plan with other instructions; nothing is released."""
    plan = found.plan(found.phase)
    return replace(plan, instructions=change([replace(i, frees=()) for i in plan.instructions]))


def without(kind: type, owner: str) -> Change:
    def change(instructions: list[Instruction]) -> list[Instruction]:
        left = [i for i in instructions if not (isinstance(i, kind) and i.owner == owner)]
        assert len(left) < len(instructions)
        return left

    return change


def early(instructions: list[Instruction]) -> list[Instruction]:
    """Update the last module before the gradient that goes down is taken."""
    (update,) = (i for i in instructions if isinstance(i, Update) and i.owner == "two")
    return [update, *(i for i in instructions if i is not update)]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (without(Update, "two"), "parameter 'two.weight' of 'two'"),
        (without(Update, "one"), "parameter 'one.weight' of 'one'"),
        (without(Assign, "one"), "buffer 'aux.held.value' of 'one'"),
        (early, "parameter 'two.weight' of 'two'"),
    ],
)
def test_a_plan_with_one_wrong_instruction(change: Any, what: str) -> None:
    found = program(kept)
    assert_lowered(found, X, Y, plan=planned(found, lambda all: all))
    with pytest.raises(
        AssertionError, match=f"'Rule' does not compute what its graph means: {what}.* step 1"
    ):
        assert_lowered(found, X, Y, plan=planned(found, change))


def test_a_plan_that_fails_or_reports_another_loss() -> None:
    found = program(chained)
    with pytest.raises(AssertionError, match=r"the plan of method 'Rule' fails: KeyError: "):
        assert_lowered(found, X, Y, plan=planned(found, without(Backward, "two")))
    with pytest.raises(AssertionError, match="means: the loss is not that"):
        assert_lowered(found, X, Y, plan=replace(found.plan(), loss=None))


@pytest.mark.parametrize("rewrite", [rounds, kept])
def test_the_assertions_hold_and_leave_the_program_as_it_was(rewrite: Rewrite) -> None:
    found = program(rewrite, accumulate=3)
    found.step(X, Y)
    before = {n: t.clone() for n, t in found.root.state_dict().items()}
    gradients = [p.grad.clone() for p in found.model.parameters() if p.grad is not None]
    for _ in range(2):
        assert_lowered(found, X, Y, steps=4)
        assert_side_by_side(found, [(X, Y)] * 4)
    assert all(torch.equal(before[n], t) for n, t in found.root.state_dict().items())
    assert [learner.pending for learner in found.built.learners.values()] == [1, 1]
    assert len(gradients) == 2
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, found.model.parameters(), strict=True))


def test_a_batch_as_the_program_takes_it_or_made_up() -> None:
    case = Case(ModelSpec("named_inputs", ("tanh",)), "dgl")
    found = case.compile(verify=False)
    assert_lowered(found, *case.batch())
    assert_lowered(found, case.batch()[0])

    def samples(ir: TrainingGraph) -> None:
        held = ir.state("one", "held", hidden(ir).meta["spec"])
        ir.assign("one", held, hidden(ir))
        ir.objective("one", ir.emit("one", inner, hidden(ir), held), "product")
        ir.objective("two", ir.apply_loss(), "loss")

    assert_lowered(program(samples), X.repeat(3, 1))
    with pytest.raises(LoccError, match="no batch was given"):
        assert_side_by_side(found, [])


def test_enough_steps_are_compared_that_every_owner_updates() -> None:
    found = program("bp", accumulate=3)
    with pytest.raises(AssertionError, match=r"parameter 'two\.weight' of 'two' .*step 3"):
        assert_lowered(found, X, Y, plan=planned(found, without(Update, "two")))


def backwards(instructions: list[Instruction]) -> list[Instruction]:
    """Take the objectives of the first module in the opposite order."""
    moved = [replace(i, retain=True) for i in instructions if isinstance(i, Backward) and i.owner == "one"]
    assert len(moved) == 3
    left = [i for i in instructions if not (isinstance(i, Backward) and i.owner == "one")]
    place = next(n for n, i in enumerate(left) if isinstance(i, Update) and i.owner == "one")
    return [*left[:place], *reversed(moved), *left[place:]]


def nudged(instructions: list[Instruction]) -> list[Instruction]:
    """Change the last bits of what the first module computes."""
    place = next(i for i, task in enumerate(instructions) if isinstance(task, Segment))
    segment = instructions[place]
    assert isinstance(segment, Segment)

    def run(*values: Any) -> tuple[Any, ...]:
        return tuple(v * (1 + 2.0**-23) for v in segment.function(*values))

    return [*instructions[:place], replace(segment, function=run), *instructions[place + 1 :]]


def test_bits_may_differ_only_where_sums_are_taken_in_another_order() -> None:
    found = program(three, model().float(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    x, y = X.float(), Y.float()
    assert_lowered(found, x, y)
    other = planned(found, backwards)
    assert trained(found, other, x, y) != trained(found, found.plan(), x, y)
    assert_lowered(found, x, y, plan=other)
    with pytest.raises(AssertionError, match="is not that of reference_step"):
        assert_lowered(found, x, y, plan=planned(found, nudged))


def trained(found: Program, plan: Plan, x: Tensor, y: Tensor) -> list[float]:
    with untouched(found):
        Trial(found).run(plan, batch_of(found, x, y), 0)
        return weights(found)


def test_a_module_program_with_one_wrong_instruction() -> None:
    found = program("bp")

    def spoilt(name: str, change: Change) -> dict[str, Any]:
        programs = dict(found.module_programs)
        plan = programs[name].plan
        left = change([replace(i, frees=()) for i in plan.instructions])
        return {**programs, name: replace(programs[name], plan=replace(plan, instructions=left))}

    batches = [(X, Y), (-X, Y)]
    assert_side_by_side(found, batches, programs=spoilt("one", lambda all: all))
    with pytest.raises(AssertionError, match=r"parameter 'one\.weight' of 'one' .*comes out different"):
        assert_side_by_side(found, batches, programs=spoilt("one", without(Update, "one")))
    with pytest.raises(AssertionError, match=r"program of module .* fails: '\w+' of '\w+' never came"):
        assert_side_by_side(found, batches, programs=spoilt("one", without(Send, "one")))
