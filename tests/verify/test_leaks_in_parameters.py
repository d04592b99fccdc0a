"""Leaks through what parameters and optimizers hold, in user models and in rewritten graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import locc
from locc.proof import prove, static, storage
from locc.proof.findings import STORAGE
from locc.runtime import Learner

from .plants import PLANTS, bare_program


@pytest.mark.parametrize("name", PLANTS)
def test_compile_refuses_a_plant_by_name(name: str) -> None:
    plant = PLANTS[name]
    with pytest.raises(plant.error) as caught:
        plant.compile(True)
    assert type(caught.value) is plant.error
    assert plant.text in str(caught.value)


@pytest.mark.parametrize("name", PLANTS)
def test_the_harmless_twin_of_a_plant_passes(name: str) -> None:
    program = PLANTS[name].compile(False)
    assert program.certificate.complete
    program.step(torch.randn(6, 4), torch.randint(0, 3, (6,)))


# ---- optimizers that no factory would be allowed to build -------------------------------------


def _prove(program: locc.Program, learners: dict[str, Learner]) -> object:
    ir = program.ir
    return prove(ir, "dgl", learners, ir.captured.example)


def _with(program: locc.Program, owner: str, optimizer: torch.optim.Optimizer) -> dict[str, Learner]:
    learners = dict(program.built.learners)
    learners[owner] = Learner(owner, learners[owner].parameters, optimizer)
    return learners


def test_two_optimizers_over_one_parameter() -> None:
    program = bare_program()
    foreign = program.model.a[0].weight
    own = program.built.learners["b"].parameters
    learners = _with(program, "b", torch.optim.SGD([*own, foreign], lr=0.1))
    with pytest.raises(locc.LocalityError) as caught:
        _prove(program, learners)
    texts = [f.text for f in caught.value.findings]
    assert any("parameter 'a.0.weight' is in two optimizers, those of 'a' and 'b'" in t for t in texts)
    assert any(
        "the optimizer of 'b' updates 'a.0.weight', which module 'a' owns; weight decay" in t for t in texts
    )
    assert {f.check for f in caught.value.findings} == {STORAGE}


def test_two_optimizers_over_overlapping_memory() -> None:
    program = bare_program()
    view = nn.Parameter(program.model.a[0].weight.detach()[1:])
    own = program.built.learners["b"].parameters
    learners = _with(program, "b", torch.optim.SGD([*own, view], lr=0.1, weight_decay=0.1))
    with pytest.raises(
        locc.LocalityError, match=r"of the optimizer of 'b' shares memory with 'a\.0\.weight'"
    ):
        _prove(program, learners)


def test_a_parameter_that_is_a_view_of_a_foreign_one() -> None:
    program = bare_program()
    program.model.b[0].weight = nn.Parameter(program.model.a[0].weight.detach())
    with pytest.raises(
        locc.LocalityError, match=r"parameter 'b\.0\.weight' of 'b' shares memory with parameter 'a\.0"
    ):
        _prove(program, program.built.learners)


def test_interleaved_views_share_no_element() -> None:
    flat = torch.zeros(8)
    tensors = [("even", flat[::2]), ("odd", flat[1::2]), ("third", flat[1::3])]
    assert sorted(static.overlapping(tensors)) == [("even", "third"), ("odd", "third")]


class _Decaying(torch.optim.SGD):
    """Shrinks a parameter that is not its own."""

    foreign: nn.Parameter

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.foreign.data.mul_(0.9)


@pytest.mark.parametrize("width", [4, 160])  # small tensors are always compared, large ones after each step
def test_an_optimizer_that_moves_a_foreign_parameter(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3))
    program = locc.compile(model, "bp", ["0", "1"], example_inputs=torch.randn(4, 4), verify=False)
    bad = _Decaying(program.built.learners["0"].parameters, lr=0.1)
    bad.foreign = model[1].weight
    learners = _with(program, "0", bad)
    before = model[1].weight.clone()
    with pytest.raises(
        locc.LocalityError, match=r"optimizer step of '0' changes parameter '1\.weight', which module '1'"
    ):
        _prove(program, learners)
    assert torch.equal(before, model[1].weight)


def test_storage_check_accepts_disjoint_optimizers() -> None:
    program = bare_program()
    assert storage.check(program.ir, program.built.learners) == []
