from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import locc
from benchmarks.meter import peak_memory
from locc import Program
from locc.ir import Phase, TrainingGraph
from locc.lower import Backward, Instruction, Loop, Plan, Segment, Update, lower
from rules import written
from runtime.turns import InPhases, Probing, norms
from support import Residual, batch, compiled, every_method, mlp, sgd, usual_case


def kinds(plan: Plan) -> list[str]:
    """The plan as words: f (forward), b (backward), u (update), with the owner."""
    letter = {Segment: "f", Backward: "b", Update: "u", Loop: "l"}
    return [f"{letter[type(i)]} {i.owner}" for i in plan.instructions]


def final_values(program: Program, data: Any = None) -> dict[str, Any]:
    """What is left in the environment after a step."""
    left: dict[str, Any] = {}

    def observe(_: object, values: dict[str, Any]) -> None:
        left["values"] = values

    program.built.executor.observe = observe
    program.step(*(data or batch()))
    program.built.executor.observe = None
    return left["values"]


# ---- order -------------------------------------------------------------------------------------


def test_each_module_is_done_before_the_next_one_starts():
    program = compiled(mlp(), InPhases(), ["relu1", "relu2"])
    names = ["relu1", "relu2", "third"]
    assert kinds(program.plan()) == [f"{kind} {name}" for name in names for kind in "fbu"]


def test_backpropagation_walks_down():
    program = compiled(mlp(), "bp", ["relu1", "relu2"])
    words = kinds(program.plan())
    assert words[:5] == ["f relu1", "f relu2", "f third", "b third", "u third"]
    assert words[5:] == ["f relu2", "b relu2", "u relu2", "f relu1", "b relu1", "u relu1"]


def test_the_order_does_not_depend_on_the_run():
    assert str(compiled(Residual(), "bp", ["blocks.*"]).plan()) == str(
        compiled(Residual(), "bp", ["blocks.*"]).plan()
    )


# ---- memory ------------------------------------------------------------------------------------


def wrongly_kept(instructions: list[Instruction], leaving: set[str]) -> set[str]:
    """The values that do not go once, with the last instruction that touches them; `leaving` stay."""
    last: dict[str, int] = {}
    freed: list[tuple[str, int]] = []
    wrong: set[str] = set()
    for i, instruction in enumerate(instructions):
        last.update(dict.fromkeys((*instruction.reads, *instruction.writes), i))
        freed += [(name, i) for name in instruction.frees]
        if isinstance(instruction, Loop):
            entries = {entry for _, entry, _ in instruction.carried}
            wrong |= wrongly_kept(instruction.body, {*instruction.reads, *instruction.writes, *entries})
    wanted = {(name, i) for name, i in last.items() if name not in leaving}
    return wrong | {name for name, _ in wanted ^ set(freed)} | {n for n, _ in freed if freed.count(n) > 1}


@pytest.mark.parametrize("method", [*every_method(), Probing()], ids=str)
def test_a_value_goes_with_its_last_reader_and_nothing_is_left_at_the_end_of_a_step(method):
    """In each phase, in the whole plan and in each module's own program."""
    case = usual_case(method)
    program = case.compile(verify=False)
    for phase in (p.name for p in program.phases) if program.phases else (None,):
        program.phase = phase
        plans = [program.plan(phase), *(p.plan for p in program.module_programs.values())]
        assert [wrongly_kept(plan.instructions, set()) for plan in plans] == [set()] * len(plans)
        assert final_values(program, case.batch()) == {}
        assert all(p.grad is None for p in program.parameters())


def test_a_phase_does_not_hold_what_of_the_batch_it_does_not_read():
    seen: list[set[str]] = []
    program = compiled(norms(), Probing(), ["a", "b"])
    program.built.executor.observe = lambda _, values: seen.append(set(values))
    program.phase = "probes"
    program.step(*batch())
    assert "input_1" in seen[0]
    assert not any("target" in values for values in seen)


@pytest.mark.parametrize("count", [2, 4, 12])
def test_the_peak_is_that_of_the_largest_module(count):
    """Guards the order: forward, backward, update and release of a module before the next one's forward."""
    width, size = 64, 256

    class Block(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())

    model = nn.Sequential(*(Block() for _ in range(12)), nn.Linear(width, 3))
    splits = [str(i) for i in range(12 // count - 1, 11, 12 // count)]
    x, y = torch.randn(size, width), torch.randint(3, (size,))
    program = locc.compile(model, InPhases(), splits, example_inputs=x, optimizer=sgd())
    whole = compiled_alone(nn.Sequential(*(Block() for _ in range(12 // count))), x, y)
    program.step(x, y)
    found = peak_memory(lambda: program.step(x, y))
    assert found == pytest.approx(whole, rel=0.05)


def compiled_alone(part: nn.Module, x: Tensor, y: Tensor) -> int:
    """Peak of one module with its head, trained by hand as in a greedy step."""
    head = nn.Linear(x.shape[1], 3)
    optimizer = sgd()([*part.parameters(), *head.parameters()])

    def step() -> None:
        # the input is the previous module's output, alive as long as this module runs
        h = part(x.clone())
        loss = functional.cross_entropy(head(h), y)
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    return peak_memory(step)


def test_the_tape_is_kept_only_where_two_passes_share_it():
    plain = compiled(mlp(), "bp", ["relu1", "relu2"]).plan()
    assert not any(i.retain for i in plan_backwards(plain))
    shared = plan_backwards(compiled(mlp(), written(two_objectives), ["relu1"]).plan())
    assert [i.retain for i in shared if i.owner == "relu1"] == [True, False]


def plan_backwards(plan: Plan) -> list[Backward]:
    return [i for i in plan.instructions if isinstance(i, Backward)]


def two_objectives(ir: TrainingGraph) -> None:
    """The mean and the sum of one output."""
    (value,) = ir.outputs(ir.modules[0].name)
    for name, function in (("mean", torch.mean), ("sum", torch.sum)):
        ir.objective(ir.modules[0].name, ir.emit(ir.modules[0].name, function, value, name=name), name)


def test_several_objectives_of_a_module_add_up():
    model = mlp().double()
    x, y = batch(dtype=torch.float64)
    weight = model.get_submodule("first").weight
    before = weight.detach().clone()
    h = model.get_submodule("relu1")(model.get_submodule("first")(x))
    (expected,) = torch.autograd.grad(h.mean() + h.sum(), weight)
    report = compiled(model, written(two_objectives), ["relu1"], optimizer=sgd(0.1)).step(x, y)
    assert list(report.objectives) == ["relu1.mean", "relu1.sum", "output.loss"]
    assert torch.allclose(weight, before - 0.1 * expected, rtol=0, atol=1e-12)


# ---- tape --------------------------------------------------------------------------------------


def test_a_stretch_without_an_objective_runs_without_a_tape():
    program = compiled(mlp(), InPhases(), ["relu1", "relu2"])
    plan = lower(program.ir, frozenset({"third"}))
    assert [(i.owner, i.taped) for i in plan.instructions if isinstance(i, Segment)] == [
        ("relu1", False),
        ("relu2", False),
        ("third", True),
    ]
    assert plan.trains == ("third",)


def test_gradient_modes_seen_by_the_modules():
    seen: dict[str, bool] = {}
    model = mlp()
    for name in ("first", "second", "third"):
        model.get_submodule(name).register_forward_hook(
            lambda m, a, o, name=name: seen.update({name: torch.is_grad_enabled()})
        )
    program = compiled(model, InPhases(), ["relu1", "relu2"], schedule="sequential")
    program.phase = "relu2"
    seen.clear()
    program.step(*batch())
    assert seen == {"first": False, "second": True}


# ---- phases ------------------------------------------------------------------------------------


def test_a_phase_drops_what_it_does_not_need():
    turns = InPhases((Phase("bottom", ("a",)), Phase("top", ("b", "c"))))
    program = compiled(norms(), turns, ["a", "b"])
    assert kinds(program.plan("bottom")) == ["f a", "b a", "u a"]
    assert program.plan("top").trains == ("b", "c")
    assert "aux" not in " ".join(
        line for i in program.plan("top").instructions if i.owner == "a" for line in i.text
    )
    with pytest.raises(locc.RunError, match="there is no phase 'tip'; nearest: 'top'"):
        program.plan("tip")
