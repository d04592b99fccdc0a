"""Planted leaks: each is caught by name before training, by the check that should see it.

In the user's model, or by a pass: in an auxiliary network, or in the function of a node.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import locc
from locc.proof import sentinel, static, storage, walk
from locc.proof.experiment.batch import small_batch
from locc.proof.findings import SENTINEL, WALK

from . import leaks
from .leaks import HARMLESS, LEAKS, Act, Chain, Planted, chain, compiled
from .plants import ThirdParty

pytestmark = pytest.mark.filterwarnings("ignore")
PLACES = ("model", "network", "function")
CAPTURED = [(n, p) for p in PLACES for n in LEAKS if (n, p) != ("checkpoint_reentrant", "model")]
"""The one left out, capture refuses already."""


def _planted(act: Act, own: bool, place: str) -> tuple[Chain, Callable[[], locc.Program]]:
    """Return a model, and what compiles it; a method's pass plants the act where the model does not."""
    model = chain(act, own=own) if place == "model" else chain(leaks.plain)
    return model, lambda: compiled(model, "dgl" if place == "model" else ThirdParty(act, own, place))


def _text(name: str, place: str = "model") -> str:
    return LEAKS[name].text.format(shared="a.shared" if place == "model" else "aux.a_tap.shared")


@pytest.mark.parametrize(("name", "place"), CAPTURED)
def test_compile_refuses_a_leak_by_name_and_leaves_the_model_alone(name: str, place: str) -> None:
    model, build = _planted(LEAKS[name].act, False, place)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(locc.LocalityError, match=r"method '(dgl|ThirdParty)' is not local") as caught:
        build()
    assert _text(name, place) in str(caught.value)
    assert {finding.check for finding in caught.value.findings} == {LEAKS[name].check}
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not hasattr(model.b, "kept")
    assert model.a.last is None


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_that_appears_in_a_live_program_is_caught(name: str) -> None:
    model = chain(LEAKS[name].act)
    model.b.active = False
    program = compiled(model)
    assert program.certificate.complete
    model.b.active = True
    with pytest.raises(locc.LocalityError) as caught:
        locc.verify(program)
    assert _text(name) in str(caught.value)
    assert f"found by {LEAKS[name].check}" in str(caught.value)


@pytest.mark.parametrize("name", LEAKS)
def test_the_sentinel_alone_sees_every_leak_and_the_graph_none(name: str) -> None:
    """The checks are independent: what the walk sees first, the sentinel sees as well."""
    model = chain(LEAKS[name].act)
    model.b.active = False
    program = compiled(model)
    model.b.active = True
    ir = program.ir
    found = sentinel.check(ir, program.optimizers, small_batch(ir, ir.captured.example))
    assert found.findings
    assert not static.check(ir)
    assert not storage.check(ir, program.built.learners)
    assert all(f.check == SENTINEL for f in found.findings)


def _passes_and_trains(build: Callable[[], locc.Program]) -> None:
    program = build()
    assert program.certificate.complete
    assert program.certificate.verdict == "strictly modular"
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    program.step(x, y)
    program.step(x, y)


@pytest.mark.parametrize(("name", "place"), CAPTURED)
def test_the_harmless_twin_of_each_leak_passes(name: str, place: str) -> None:
    leak = LEAKS[name]
    _passes_and_trains(_planted(leak.harmless, leak.twin is leaks.OWN, place)[1])


@pytest.mark.parametrize("place", ["model", "network"])
@pytest.mark.parametrize("act", HARMLESS)
def test_a_harmless_look_alike_passes(act: Act, place: str) -> None:
    _passes_and_trains(_planted(act, False, place)[1])


def test_the_path_runs_from_the_objective_to_the_parameter() -> None:
    ir = compiled(chain(leaks.plain), verify=False).ir
    entry = ir.boundaries(consumer="b")[0].entry
    entry.replace_all_uses_with(entry.all_input_nodes[0])
    ir.graph.erase_node(entry)
    finding = next(f for f in static.check(ir) if f.tensor == "a.linear.weight")
    assert finding.path[0].startswith(ir.objectives("b")[0].name)
    assert finding.path[-1].startswith("a of 'a'")


def test_the_path_names_the_line_of_the_users_code() -> None:
    with pytest.raises(locc.LocalityError, match=r"path: b\.loss <- .*leaks\.py:\d+.* <- a\.linear\.weight"):
        compiled(chain(leaks.reads_stash))


def test_a_model_that_needs_data_is_walked_on_real_tensors_and_says_so() -> None:
    def branching(m: Planted, x: torch.Tensor) -> torch.Tensor:
        return leaks.plain(m, x) * (1.0 if float(x.detach().abs().sum()) >= 0 else 2.0)

    program = compiled(chain(branching))
    (check,) = [c for c in program.certificate.checks if c.name == WALK]
    assert "tiny real tensors, since fake ones do not run" in check.detail
    assert program.certificate.complete


def test_a_leak_behind_data_dependent_code_is_caught_on_real_tensors() -> None:
    def branching(m: Planted, x: torch.Tensor) -> torch.Tensor:
        return leaks.reads_stash(m, x) if float(x.detach().abs().sum()) >= 0 else leaks.plain(m, x)

    with pytest.raises(
        locc.LocalityError, match=r"reaches parameter 'a\.linear\.weight'.*found by autograd walk"
    ):
        compiled(chain(branching))


def test_the_walk_runs_without_data_by_default() -> None:
    ir = compiled(chain(leaks.own_straight_through)).ir
    assert walk.check(ir, small_batch(ir, ir.captured.example)).how == "fake tensors (meta)"
