"""Leaks through what parameters and optimizers hold; more are planted by tests/mutants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import locc
from locc.proof import prove, static
from locc.runtime import Learner

from .leaks import Chain, plain
from .plants import Decaying


def viewing(leak: bool) -> Chain:
    model = Chain(plain)
    foreign = model.a.linear.weight.detach()
    model.b.linear.weight = nn.Parameter(foreign.t() if leak else foreign.t().clone())
    return model


def interleaving(leak: bool) -> Chain:
    """Two modules whose weights lie in one storage; only where they overlap do they share anything."""
    model, flat = Chain(plain), torch.randn(33)
    model.a.linear.weight = nn.Parameter(flat[0:32:2].view(4, 4))
    model.b.linear.weight = nn.Parameter(flat[2:18].view(4, 4) if leak else flat[1:33:2].view(4, 4))
    return model


@pytest.mark.parametrize("plant", [viewing, interleaving])
def test_memory_of_two_owners_is_refused_and_a_storage_of_both_is_not(plant: Callable[[bool], Chain]) -> None:
    x = torch.randn(4, 4)
    text = r"of 'b' shares memory with parameter 'a\.linear\.weight' of 'a'"
    with pytest.raises(locc.LocalityError, match=text):
        locc.compile(plant(True), "dgl", ["a", "b", "c"], example_inputs=x)
    program = locc.compile(plant(False), "dgl", ["a", "b", "c"], example_inputs=x)
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


@pytest.mark.parametrize(
    ("hold", "text"),
    [
        (lambda w: w, "parameter 'a.linear.weight' is in two optimizers, those of 'a' and 'b'"),
        (lambda w: w, "the optimizer of 'b' updates 'a.linear.weight', which module 'a' owns; weight decay"),
        (
            lambda w: nn.Parameter(w.detach()[1:]),
            "of the optimizer of 'b' shares memory with 'a.linear.weigh",
        ),
    ],
)
def test_two_optimizers_over_one_memory(hold: Callable[[nn.Parameter], nn.Parameter], text: str) -> None:
    program = locc.compile(Chain(plain), "dgl", ["a", "b", "c"], example_inputs=torch.randn(4, 4))
    program.optimizers["b"].add_param_group({"params": [hold(program.model.a.linear.weight)]})
    with pytest.raises(locc.LocalityError) as caught:
        locc.verify(program)
    assert any(text in finding.text for finding in caught.value.findings)
