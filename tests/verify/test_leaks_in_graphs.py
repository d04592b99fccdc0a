"""Leaks in rewritten graphs, from passes that a third party could write, or built past the invariants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

import locc
from locc.ir import TrainingGraph
from locc.proof import static

from .leaks import HARMLESS, LEAKS, OWN, Act, Chain, plain
from .plants import ThirdParty, bare_program

PLACES = ("network", "function")


def _planted(act: Act, own: bool, place: str) -> tuple[Chain, Callable[[], locc.Program]]:
    """Return a clean model, and what compiles it by a method whose pass plants an act."""
    torch.manual_seed(0)
    model = Chain(plain)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    method = ThirdParty(act, own, place)
    return model, lambda: locc.compile(model, method, ["a", "b", "c"], example_inputs=x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LEAKS)
def test_compile_refuses_a_leak_that_a_pass_adds_by_name(name: str, place: str) -> None:
    leak = LEAKS[name]
    model, build = _planted(leak.act, False, place)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(locc.LocalityError, match="method 'ThirdParty' is not local") as caught:
        build()
    assert leak.text.format(shared="aux.a_tap.shared") in str(caught.value)
    assert {finding.check for finding in caught.value.findings} == {leak.check}
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LEAKS)
def test_the_harmless_twin_of_a_leak_that_a_pass_adds_passes(name: str, place: str) -> None:
    leak = LEAKS[name]
    _passes_and_trains(*_planted(leak.harmless, leak.twin is OWN, place))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", HARMLESS)
def test_a_harmless_look_alike_that_a_pass_adds_passes(act: Act) -> None:
    _passes_and_trains(*_planted(act, False, "network"))


def _passes_and_trains(model: Chain, build: Callable[[], locc.Program]) -> None:
    program = build()
    assert program.certificate.complete
    assert program.certificate.verdict == "strictly modular"
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    program.step(x, y)
    program.step(x, y)


# ---- graphs built past the invariants ---------------------------------------------------------


def _boundary(ir: TrainingGraph, consumer: str) -> fx.Node:
    return ir.boundaries(consumer=consumer)[0].entry


def _objective(ir: TrainingGraph, owner: str) -> fx.Node:
    return ir.objectives(owner)[0]


def _drop_stop_gradient(ir: TrainingGraph) -> None:
    entry = _boundary(ir, "b")
    (value,) = entry.all_input_nodes
    entry.replace_all_uses_with(value)
    ir.graph.erase_node(entry)


def test_the_path_runs_from_the_objective_to_the_parameter() -> None:
    program = bare_program()
    _drop_stop_gradient(program.ir)
    finding = next(f for f in static.check(program.ir) if f.tensor == "a.0.weight")
    assert finding.path[0].startswith(_objective(program.ir, "b").name)
    assert finding.path[-1].startswith("a of 'a'")
