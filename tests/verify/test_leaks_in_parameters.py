"""Leaks through what parameters and optimizers hold, in user models and in rewritten graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import locc
from locc.proof import prove, static
from locc.runtime import Learner

from .plants import PLANTS, Decaying


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


def test_interleaved_views_share_no_element() -> None:
    flat = torch.zeros(8)
    tensors = [("even", flat[::2]), ("odd", flat[1::2]), ("third", flat[1::3])]
    assert sorted(static.overlapping(tensors)) == [("even", "third"), ("odd", "third")]


@pytest.mark.parametrize("width", [4, 160])  # small tensors are always compared, large ones after each step
def test_an_optimizer_that_moves_a_foreign_parameter(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3))
    program = locc.compile(model, "bp", ["0", "1"], example_inputs=torch.randn(4, 4), verify=False)
    bad = Decaying(program.built.learners["0"].parameters, lr=0.1)
    bad.extra = model[1].weight
    learners = program.built.learners | {"0": Learner("0", program.built.learners["0"].parameters, bad)}
    before = model[1].weight.clone()
    with pytest.raises(
        locc.LocalityError, match=r"optimizer step of '0' changes parameter '1\.weight', which module '1'"
    ):
        prove(program.ir, "bp", learners, program.ir.captured.example)
    assert torch.equal(before, model[1].weight)
