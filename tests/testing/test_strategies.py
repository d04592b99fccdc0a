from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import Tensor, nn

import locc
from locc import catalogue, registry, testing
from locc.testing import Case, ModelSpec, assert_local, cases, methods, models, programs, splits
from locc.testing.families import FAMILIES
from support import batch


class Named(nn.Module):
    """Defined in another order than called; the last call is `first`'s."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.relu = nn.ReLU()
        self.unused = nn.Linear(4, 4)
        self.pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.stem = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.pair(self.relu(self.stem(x))))


def drawn(strategy: st.SearchStrategy[Any], count: int = 100) -> list[Any]:
    found = []

    @settings(max_examples=10, phases=[Phase.generate])
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    for number in range(count // 10):  # longer runs draw copies of parts of earlier examples
        seed(number)(collect)()
    return found


# ---- what is drawn ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_draws_reach_every_family_method_and_schedule() -> None:
    count = (
        400  # even draws of forty methods then miss one of them once in a thousand runs; 200, once in five
    )
    seen = drawn(cases(), count)
    assert len(seen) == count
    assert {case.model.family for case in seen} == set(FAMILIES)
    assert {case.method for case in seen} == set(locc.methods())
    schedules = Counter(case.schedule for case in seen)
    assert schedules.keys() == {"lockstep", "sequential"}
    assert min(schedules.values()) > 15


@pytest.mark.parametrize(
    ("wrong", "smallest"),
    [
        (lambda case: True, ModelSpec("chain")),
        (lambda case: case.model.width == 8, ModelSpec("chain", width=8)),
        (lambda case: case.model.family != "chain", ModelSpec("residual")),
    ],
)
def test_a_failure_shrinks_to_a_chain_of_two_modules_and_two_samples(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Case], bool], smallest: ModelSpec
) -> None:
    monkeypatch.setattr(Case, "refusal", lambda self: None)
    seen: list[Case] = []

    @settings(phases=[Phase.generate, Phase.shrink])
    @given(cases())
    def fails(case: Case) -> None:
        seen.append(case)
        assert not wrong(case)

    with pytest.raises(AssertionError):
        fails()
    found = seen[-1]
    assert found.model == smallest
    assert found.splits in (("stem",), 2)
    assert (found.batch_size, found.seed, found.schedule, found.optimizer) == (2, 0, "lockstep", "sgd")
    assert not found.options


@settings(max_examples=20)
@given(cases(model=ModelSpec("residual"), method="dgl", schedules=["sequential"]))
def test_a_case_may_be_pinned(case: Case) -> None:
    assert (case.model, case.method, case.schedule) == (ModelSpec("residual"), "dgl", "sequential")


@settings(max_examples=8)
@given(cases(model=models(["attention"], max_blocks=1), method=methods(exclude=["bp", "dgl"])))
def test_a_case_may_be_steered(case: Case) -> None:
    assert case.model.family == "attention"
    assert len(case.model.blocks) == 1
    assert case.method not in ("bp", "dgl")


def test_a_method_that_few_models_admit_is_drawn() -> None:
    """Without Hypothesis saying that too much is filtered out."""
    assert {case.method for case in drawn(cases(method="bcd3"), 10)} == {"bcd3"}


@settings(max_examples=30)
@given(st.data())
def test_batches_have_two_samples_or_more(data: st.DataObject) -> None:
    spec = ModelSpec("two_inputs", loss="mse")
    (x, side), y = data.draw(testing.batches(spec, max_size=4))
    assert x.shape == side.shape
    assert y.shape == (x.shape[0], 3)
    assert 2 <= x.shape[0] <= 4


def test_methods_of_other_packages_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**catalogue.registered(), "mine": ("locc_passes.baseline.bp:BP", "my_methods")}
    for home in (catalogue, registry):
        monkeypatch.setattr(home, "registered", lambda: known)
    assert find(methods(exclude=locc.methods().keys() - {"mine"}), lambda _: True) == "mine"
    with pytest.raises(
        locc.LoccError, match=r"methods\(exclude=...\) names 'dgll', which is no method; .*'dgl'"
    ):
        methods(exclude=["dgll"])


# ---- splits of any module -----------------------------------------------------------------------


def test_splits_of_a_module_follow_its_forward() -> None:
    model, (x, _) = Named(), batch()
    before = torch.get_rng_state()
    found = set(drawn(splits(model, x)))
    assert found == {
        ("stem",),
        ("pair",),
        ("pair.0",),
        ("pair.1",),
        ("stem", "pair"),
        ("stem", "pair.0"),
        ("stem", "pair.1"),
        ("stem", "pair.0", "pair.1"),
        ("pair.0", "pair.1"),
    }
    assert torch.equal(before, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())
    for names in found:
        locc.compile(Named(), "bp", names, example_inputs=x, verify=False)


def test_without_inputs_splits_follow_the_definition() -> None:
    found = drawn(splits(Named()))
    assert ("first", "unused") in found
    assert not any("stem" in names for names in found)


def test_a_module_that_cannot_be_split() -> None:
    with pytest.raises(locc.LoccError, match="no split can be drawn for Linear: it has no submodule"):
        splits(nn.Linear(3, 3))
    with pytest.raises(locc.LoccError, match="no split can be drawn for Sequential"):
        splits(nn.Sequential(nn.ReLU()))


# ---- programs -----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(programs(Named, batch()[0], clip=1.0))
def test_programs_of_a_model_of_ones_own(program: locc.Program) -> None:
    assert isinstance(program.model, Named)
    assert len(program.ir.modules) > 1
    assert program.settings.clip == 1.0
    program.step(*batch())
    assert_local(program)


@settings(max_examples=10)
@given(programs(method="dtp", seed=7, verify=False))
def test_programs_of_the_kits_models(program: locc.Program) -> None:
    assert program.method == "dtp"
    assert program.built.executor.seed == 7


def test_programs_needs_inputs() -> None:
    with pytest.raises(locc.LoccError, match=r"programs\(model\) needs example_inputs"):
        programs(Named)


def test_only_what_is_undefined_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind is a finding, not a reason to look elsewhere."""

    def broken(*_: Any, **__: Any) -> Any:
        raise locc.MethodError("an option is wrong")

    monkeypatch.setattr("locc.testing.case.compile", broken)
    with pytest.raises(locc.MethodError, match="an option is wrong") as found:
        find(cases(method="bp"), lambda _: True)
    assert any("while compiling Case(model=ModelSpec(" in note for note in found.value.__notes__)


def test_what_is_undefined_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "refusal", lambda self: "undefined on this model")
    monkeypatch.setattr("locc.testing.strategies.TRIES", 2)
    with pytest.raises(Unsatisfiable):
        find(cases(model=ModelSpec("residual")), lambda _: True)


def test_a_schedule_that_is_not_admitted_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Case, "refusal", lambda self: None if self.schedule == "lockstep" else "schedule='sequential'"
    )
    assert {case.schedule for case in drawn(cases(schedules=["sequential", "lockstep"]), 30)} == {"lockstep"}
    monkeypatch.setattr("locc.testing.strategies.TRIES", 2)
    with pytest.raises(Unsatisfiable):
        find(cases(model=ModelSpec("residual"), schedules=["sequential"]), lambda _: True)


# ---- without Hypothesis -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batches", "cases", "methods", "models", "programs", "splits"])
def test_without_hypothesis_a_strategy_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "locc.testing.strategies", raising=False)
    monkeypatch.delitem(vars(testing), name, raising=False)
    with pytest.raises(locc.LoccError, match=rf"locc\.testing\.{name} is .* `pip install locc\[testing\]`"):
        getattr(testing, name)


def test_an_attribute_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match=r"module 'locc\.testing' has no attribute 'casses'"):
        testing.casses  # noqa: B018
