"""The run of a whole program that an assertion looks at, and what is played to an owner that runs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locc.lower import Loop, Plan, Segment
from locc.runtime import Executor
from locc.testing.alone import MissingError, Tape, Whole
from locc.testing.trial import batch_of, difference, instructions_of, twin

from .planted import Chain, Residual, batch, program_of


@pytest.mark.parametrize("method", ["bp", "dgl", "dtp"])
def test_a_state_compares_all_that_a_module_learns(method: str) -> None:
    """Parameters, buffers, optimizer state and objectives are in it, under the user's names."""
    program = program_of(Chain(), method, optimizer=torch.optim.Adam)
    whole = Whole(program, batch_of(program, *batch()))
    names = list(whole.states["b"])
    loss = [str(n.meta["objective"]) for n in program.ir.objectives("b")]
    for name in (
        "parameter 'b.linear.weight'",
        "buffer 'b.mean'",
        "optimizer state 'exp_avg' of 'b.linear.bias'",
    ):
        assert name in names
    assert loss
    assert {f"objective '{name}'" for name in loss} <= set(names)
    for name, value in whole.states["b"].items():
        changed = torch.nextafter(value.double(), torch.tensor(torch.inf, dtype=torch.float64)).to(
            value.dtype
        )
        if not torch.equal(changed, value):
            assert difference(whole.states["b"], {**whole.states["b"], name: changed}) == name
    assert difference(whole.states["b"], dict(whole.states["b"])) is None


@pytest.mark.parametrize(
    ("method", "options"),
    [("dgl", {"accumulate": 3}), ("bp", {"clip": 0.01}), ("dgl", {"schedule": "sequential"})],
    ids=["accumulate", "clip", "sequential"],
)
def test_the_whole_run_is_what_the_next_steps_of_the_program_are(
    method: str, options: dict[str, Any]
) -> None:
    """Pending gradients, the step's random numbers and frozen modules included, in eval mode as well."""
    program = program_of(Residual(), method, splits=["stem", "one", "two"], **options)
    program.step(*batch(seed=8))
    if program.phases:
        program.phase = program.phases[2].name
    program.eval()
    whole = Whole(program, batch_of(program, *batch()))
    assert whole.steps == (2 if "accumulate" in options else 1)
    program.train()
    reports = [program.step(*batch()).objectives for _ in range(whole.steps)]
    for owner, state in whole.states.items():
        assert difference(state, whole.holdings.state(owner, reports)) is None
        assert not any("gradient" in name for name in state)  # an update has used it up


def played(times: int = 3) -> tuple[Plan, list[Tensor]]:
    """Two owners in one loop: `a` makes the first value, and `b` what goes round."""

    def segment(owner: str, act: Callable[..., Tensor], reads: tuple[str, ...], write: str) -> Segment:
        return Segment(owner, False, lambda _, *values: (act(*values),), (), reads, (write,))

    first = segment("a", lambda x: x + 1, ("x",), "start")
    body = [
        segment("a", lambda entry: 2 * entry, ("entry",), "doubled"),
        segment("b", lambda entry, doubled: entry * doubled - 1, ("entry", "doubled"), "end"),
    ]
    loop = Loop("a", "round", times, (("start", "entry", "end"),), body, ("start",), ("end",))
    last = segment("b", lambda end, x: end - x, ("end", "x"), "result")
    return Plan([first, loop, last], (), ("x",), None), [torch.tensor([0.5, -0.25])]


@pytest.mark.parametrize("owner", ["a", "b"])
def test_a_loop_of_two_owners_is_played_round_by_round(owner: str) -> None:
    plan, values = played()
    executor = Executor(nn.Module(), {}, 0)
    tape = Tape()
    executor.observe = tape.record
    executor.run(plan, values, 0)
    again = Tape()
    executor.observe = again.record
    executor.run(tape.only(plan, frozenset({owner})), values, 0)
    own = [i for i in instructions_of(plan.instructions) if i.owner == owner and isinstance(i, Segment)]
    assert len(own) == 2
    for instruction in own:
        wanted, found = tape.runs[id(instruction)], again.runs[id(instruction)]
        assert len(wanted) == len(found)
        for one, other in zip(wanted, found, strict=True):
            assert all(torch.equal(one.values[n], other.values[n]) for n in instruction.writes)
    with pytest.raises(MissingError, match=r"needs 'start' of 'a' before|needs 'end' of 'b' before"):
        executor.run(Tape().only(plan, frozenset({owner})), values, 0)


def test_what_only_one_of_two_states_has_is_a_difference() -> None:
    assert difference({"x": 1}, {}) == difference({}, {"x": 1}) == "x"
    assert difference({"x": 1, "y": 2}, {"x": 1.0, "y": 3}) == "x (and 1 more)"
    assert difference({"x": torch.tensor(float("nan"))}, {"x": torch.tensor(float("nan"))}) is None


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(6, 4)[1::2, 1:],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3, 1).expand(3, 5),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.tensor(True),
    ],
    ids=["slice", "channels last", "expanded", "conjugate", "scalar"],
)
def test_a_twin_has_the_layout_of_its_original_and_memory_of_its_own(value: Tensor) -> None:
    copy = twin({"deep": [value.requires_grad_() if value.is_floating_point() else value]})["deep"][0]
    assert torch.equal(copy, value)
    assert copy.stride() == value.stride()
    assert copy.storage_offset() == value.storage_offset() or value.is_conj()
    assert not copy.requires_grad
    assert copy.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
