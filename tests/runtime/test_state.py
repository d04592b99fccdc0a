"""What lives across steps: state, its resets and batch sizes, and delayed values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import locc
from locc import GraphError, LoccError, Program, RunError
from locc.ir import TensorSpec, TrainingGraph, carry
from locc.ir.spec import BatchDim
from locc.ir.state import State, states
from locc.ir.view import Phase, Repeat
from locc.testing import assert_lowered, assert_side_by_side
from rules import written
from support import everything, same, sgd

F64 = torch.float64
START = 0.25


class Net(nn.Module):
    """Two modules; the second input is for the method alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor, done: Tensor) -> Tensor:
        return self.b(self.a(x))


def gap(h: Tensor, held: Tensor) -> Tensor:
    return (h - held).square().mean()


def follow(held: Tensor, h: Tensor) -> Tensor:
    return 0.5 * held + h


def total(value: Tensor) -> Tensor:
    return value.mean()


def holding(**options: Any) -> Callable[[TrainingGraph], None]:
    """The first module is drawn to what it held before, and holds on to what it computes."""

    def rewrite(ir: TrainingGraph) -> None:
        first = ir.modules[0].name
        (h,) = ir.outputs(first)
        held = ir.state(first, "held", h.meta["spec"], START, **options)
        ir.assign(first, held, ir.emit(first, follow, held, ir.stop_gradient(first, h, role="now")))
        ir.objective(first, ir.emit(first, gap, h, held), "gap")

    return rewrite


def never(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool)


def data(size: int, number: int = 0, done: Tensor | None = None) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(100 * size + number)
    x, y = torch.randn(size, 4, generator=generator, dtype=F64), torch.arange(size) % 3
    return (x, never(size) if done is None else done), y


def build(function: Any = None, rate: float = 0.1, **options: Any) -> Program:
    torch.manual_seed(0)
    options = {"example_inputs": data(5)[0], "seed": 0, "optimizer": sgd(rate), **options}
    return locc.compile(Net().double(), written(function or holding()), ["a"], **options)


def held(program: Program) -> State:
    return next(state for _, state in states(program.root) if state.name == "held")


# ---- batch sizes -------------------------------------------------------------------------------


def test_a_state_is_allocated_at_the_first_batch_and_has_nothing_of_the_example():
    program = build()
    assert held(program).value.shape == (0, 6)
    x, y = data(7)
    h = program.model.a(x[0]).detach()
    report = program.step(x, y)
    assert float(report.objectives["a.gap"]) == pytest.approx(float(gap(h, torch.tensor(START))), abs=1e-12)
    assert torch.equal(held(program).value, follow(torch.full((7, 6), START, dtype=F64), h))
    assert held(program).initial.shape == ()


def test_another_batch_size_starts_anew():
    program = build(rate=0.0)
    for size in (5, 5, 3):
        program.step(*data(size))
    h = program.model.a(data(3)[0][0]).detach()
    assert torch.equal(held(program).value, follow(torch.full((3, 6), START, dtype=F64), h))


def test_another_batch_size_may_be_refused_and_then_nothing_has_changed():
    def rewrite(ir: TrainingGraph) -> None:
        holding()(ir)  # starts anew, and comes first
        first = ir.modules[0].name
        (h,) = ir.outputs(first)
        kept = ir.state(first, "kept", h.meta["spec"], resize="error")
        ir.assign(first, kept, ir.stop_gradient(first, h, role="now"))
        ir.objective(first, ir.emit(first, gap, h, kept, name="other"), "other")

    program = build(rewrite)
    program.step(*data(5))
    before = everything(program)
    message = (
        r"state 'kept' of 'a' holds \(5, 6\) from the step before, and a batch of 4 needs \(4, 6\); keep "
        r"the batch size \(drop_last=True\), or declare the state with resize='reset'"
    )
    with pytest.raises(RunError, match=message):
        program.step(*data(4))
    assert same(before, everything(program))
    program.step(*data(5, 1))


# ---- kept --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [None, 3, 5])
def test_a_checkpoint_holds_it_whatever_the_loading_program_has_seen(tmp_path, seen):
    whole, other = build(), build()
    for number in range(2):
        whole.step(*data(5, number))
    whole.save(tmp_path / "state")
    if seen is not None:
        other.step(*data(seen, 9))
    other.load(tmp_path / "state")
    assert same(everything(whole), everything(other))
    for program in (whole, other):
        program.step(*data(5, 2))
    assert same(everything(whole), everything(other))


def test_a_checkpoint_that_fails_to_load_leaves_it_as_it_was(tmp_path, monkeypatch):
    program = build()
    program.step(*data(5))
    program.save(tmp_path / "state")
    program.step(*data(3))
    before = everything(program)
    optimizer = program.optimizers["b"]
    load, calls = optimizer.load_state_dict, []

    def once(state: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("broken optimizer")
        load(state)

    monkeypatch.setattr(optimizer, "load_state_dict", once)
    with pytest.raises(locc.CheckpointError, match="does not fit this program: ValueError: broken optimizer"):
        program.load(tmp_path / "state")
    assert same(before, everything(program))


def test_it_goes_where_the_program_goes_and_keeps_its_dtype():
    stays, moves = build(), build()
    for program in (stays, moves):
        program.step(*data(5))
    assert moves._apply(lambda t: t.clone()) is moves  # as `to` does with another device
    for program in (stays, moves):
        program.step(*data(5, 1))
    assert same(everything(stays), everything(moves))
    before = held(moves).value
    with pytest.raises(LoccError, match=r"program is compiled for torch\.float64; cast the model before"):
        moves.float()
    assert held(moves).value is before
    assert before.dtype == F64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_moves_to_the_device():
    here, there = build(), build()
    for program in (here, there):
        program.step(*data(5))
    there.to("cuda")
    assert held(there).value.device.type == held(there).initial.device.type == "cuda"
    for number, size in enumerate((5, 3)):
        for program in (here, there):
            program.step(*data(size, number))
        assert torch.allclose(held(here).value, held(there).value.cpu(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [5, 3])
@pytest.mark.parametrize("fails", ["the batch", "the step"])
def test_an_atomic_step_that_fails_brings_it_back(size, fails):
    """Also where the failing batch was of another size."""
    program = build(atomic=True, loss=functional.cross_entropy)
    program.step(*data(5))
    before = everything(program)
    (x, done), y = data(size, 1)
    if fails == "the batch":
        x[0, 0] = float("nan")
        with pytest.raises(RunError, match="objective 'gap' of module 'a' is nan"):
            program.step((x, done), y)
    else:  # when the first module has assigned and updated
        with pytest.raises(RunError, match=r"Target 9 is out of bounds\. The whole step is undone"):
            program.step((x, done), torch.full((size,), 9))
    assert same(before, everything(program))


def test_proofs_and_inference_leave_it_alone():
    program = build()
    for number in range(2):
        program.step(*data(4, number))
    state, before = held(program).value, everything(program)
    for real in (True, False, None):
        locc.verify(program, real=real)
    locc.verify(program, *data(6))
    program.evaluate([data(3), data(5)])
    program.eval()(*data(2)[0])
    assert held(program).value is state
    assert same(before, everything(program))


def test_module_programs_beside_each_other_keep_it():
    program = build()
    program.step(*data(5))
    assert_side_by_side(program, [data(5, number) for number in range(3)])


# ---- resets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(BatchDim(), 6), (2, BatchDim(), 6)], ids=["B first", "B second"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_flag_of_the_batch_renews_its_samples(whole, shape):
    """The state of a recurrent network may have the batch second: [layers, B, features]."""
    initial = torch.linspace(0.1, 0.6, 6, dtype=F64)

    def rewrite(ir: TrainingGraph) -> None:
        (h,) = ir.outputs("a")
        state = ir.state("a", "held", TensorSpec(shape, F64), initial, reset=ir.inputs[1])
        ir.assign("a", state, ir.emit("a", follow, state, ir.stop_gradient("a", h, role="now")))
        ir.objective("a", ir.emit("a", gap, h, state), "gap")

    size = 2  # as many as layers: a flag along the wrong dimension would not be found by its shape
    flags = [[0, 0], [1, 0], [0, 0], [0, 1], [1, 1], [0, 0]]
    example = data(size, done=torch.tensor(False) if whole else None)[0]
    program = build(rewrite, rate=0.0, example_inputs=example)
    value = initial.expand(TensorSpec(shape, F64).concrete(size))
    for number, flag in enumerate(flags):
        done = torch.tensor(bool(flag[0])) if whole else torch.tensor(flag, dtype=torch.bool)
        x, y = data(size, number, done)
        renewed = done.expand(size)[:, None]  # [B,1], against [...,B,6]
        value = torch.where(renewed, initial, value)
        h = program.model.a(x[0]).detach()
        report = program.step(x, y)
        assert float(report.objectives["a.gap"]) == pytest.approx(float(gap(h, value)), abs=1e-12)
        value = follow(value, h)
        assert torch.allclose(held(program).value, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "source", "found"),
    [
        (TensorSpec((6,), F64), 1, r"f64\[6\], and reset= is bool\[B\]"),
        (TensorSpec((BatchDim(), 6), F64), 0, r"f64\[B,6\], and reset= is f64\[B,4\]"),
        (TensorSpec((BatchDim(2), 6), F64), 1, r"f64\[2\*B,6\], and reset= is bool\[B\]"),
    ],
)
def test_a_flag_that_does_not_fit_is_refused(spec, source, found):
    def rewrite(ir: TrainingGraph) -> None:
        ir.state("a", "held", spec, reset=ir.inputs[source])

    with pytest.raises(GraphError, match=rf"state 'held' of 'a' is {found}; give a flag \[\] for the whole"):
        build(rewrite)


# ---- accumulation ------------------------------------------------------------------------------


def test_under_accumulation_state_belongs_to_the_step_and_parameters_to_the_update():
    program = build(accumulate=3)
    value = torch.full((5, 6), START, dtype=F64)
    weight, gradients = program.model.a[0].weight, []
    for number in range(7):
        x, y = data(5, number)
        before = weight.detach().clone()
        h = program.model.a(x[0])
        gradients.append(torch.autograd.grad(gap(h, value), weight)[0])
        value = follow(value, h.detach())
        program.step(x, y)
        assert torch.allclose(held(program).value, value, rtol=0, atol=1e-12)
        if number % 3 == 2:
            before -= 0.1 * torch.stack(gradients[-3:]).mean(0)
        assert torch.allclose(weight, before, rtol=0, atol=1e-12)


# ---- delays ------------------------------------------------------------------------------------


def features(h: Tensor, x: Tensor) -> Tensor:
    return (h[:, :4] - x).square().mean()


def classes(h: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(h[:, :3], y)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_delayed_value_is_that_of_so_many_steps_ago(steps):
    """Of an owner's value, of an input and of the target; before that, the initial one."""

    def rewrite(ir: TrainingGraph) -> None:
        (h,) = ir.outputs("a")
        y = TensorSpec((BatchDim(),), torch.int64)
        late_h = ir.delay(ir.stop_gradient("a", h, role="now"), steps, START)
        late_x = ir.delay(ir.inputs[0], steps, torch.arange(4.0), owner="a")
        late_y = ir.delay(ir.target, steps, 2, owner="a", spec=y)
        for function, late in ((gap, late_h), (features, late_x), (classes, late_y)):
            ir.objective("a", ir.emit("a", function, h, late, spec=ir.scalar), function.__name__)

    program = build(rewrite, rate=0.0)
    seen = [
        (torch.full((5, 6), START, dtype=F64), torch.arange(4.0, dtype=F64).expand(5, 4), torch.full((5,), 2))
    ] * steps
    for number in range(6):
        x, y = data(5, number)
        h = program.model.a(x[0]).detach()
        seen.append((h, x[0], y.roll(number)))
        report = program.step(x, y.roll(number))
        for function, late in zip((gap, features, classes), seen[number], strict=True):
            wanted = float(function(h, late))
            assert float(report.objectives[f"a.{function.__name__}"]) == pytest.approx(wanted, abs=1e-12)
    assert len(list(states(program.root))) == 3 * steps
    assert_lowered(program, *data(5), steps=5)


def test_a_delay_moves_in_the_phases_that_read_it_whoever_trains():
    def rewrite(ir: TrainingGraph) -> None:
        (h,) = ir.outputs("a")
        now = ir.stop_gradient("a", h, role="now")
        late = ir.delay(now, 2)
        own = ir.state("a", "own", h.meta["spec"])
        ir.assign("a", own, now)
        ir.objective("a", ir.emit("a", gap, h, late), "gap")
        ir.add_owner("probe", ir.modules[0])
        path = ir.add_module("probe", nn.Linear(6, 6).double())
        guess = ir.call("probe", path, ir.stop_gradient("probe", late), role="probe")
        ir.objective("probe", ir.emit("probe", total, guess), "total")
        ir.phases = (Phase("train", ("a",)), Phase("read", ("probe",)), Phase("neither", ("b",)))

    program = build(rewrite, rate=0.0)
    one, two, three = (state for _, state in states(program.root))
    expected = {state: torch.zeros(5, 6, dtype=F64) for state in (one, two, three)}
    for number, phase in enumerate(["train", "read", "neither", "read", "train", "neither", "read"]):
        program.phase = phase
        x, y = data(5, number)
        h = program.model.a(x[0]).detach()
        program.step(x, y)
        if phase != "neither":
            expected[two], expected[one] = expected[one], h
        if phase == "train":
            expected[three] = h
        for state, value in expected.items():
            assert torch.allclose(state.value, value, rtol=0, atol=1e-12), (number, state.name)
        assert_lowered(program, *data(5), steps=3)


def test_a_delay_that_cannot_be_says_what_it_needs():
    for wrong in (
        lambda ir: ir.delay(ir.target, 1, owner="a"),
        lambda ir: ir.delay(ir.inputs[0], 1),
        lambda ir: ir.delay(ir.outputs("a")[0], -1),
    ):
        with pytest.raises(
            GraphError, match="needs a number of steps of at least 0, and owner= and spec= wh"
        ):
            build(wrong)


def test_a_repeated_region_may_start_from_a_state():
    def rewrite(ir: TrainingGraph) -> None:
        (h,) = ir.outputs("a")
        now = ir.stop_gradient("a", h, role="now")
        state = ir.state("a", "held", h.meta["spec"], START)
        code = ir.emit("a", carry, state, role="code")
        moved = ir.emit("a", follow, code, now)
        code.meta["repeat"] = moved.meta["repeat"] = "settling"
        ir.repeats["settling"] = Repeat("settling", 3, ((code, moved),))
        ir.assign("a", state, moved)
        ir.objective("a", ir.emit("a", gap, h, moved), "gap")

    program = build(rewrite, rate=0.0)
    value = torch.full((5, 6), START, dtype=F64)
    for number in range(3):
        x, y = data(5, number)
        for _ in range(3):
            value = follow(value, program.model.a(x[0]).detach())
        program.step(x, y)
        assert torch.allclose(held(program).value, value, rtol=0, atol=1e-12)
    assert_lowered(program, *data(5), steps=3)
