"""`assert_local`: proves a program afresh and believes no check that did not finish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import locc
from locc.testing import assert_isolated, assert_local, assert_pipeline_exact

from .planted import Chain, Leaf, batch, program_of


class Live(Leaf):
    """Keeps its activation with the tape."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        self.kept = h
        return h


def leaky() -> Chain:
    model = Chain(lambda other: other.kept)
    model.a = Live()
    model.b.others = (model.a,)
    return model


def test_returns_a_fresh_certificate() -> None:
    program = program_of(Chain())
    before = program.certificate
    found = assert_local(program)
    assert found is program.certificate
    assert found is not before
    assert found.graph_hash == before.graph_hash
    assert found.complete


def test_a_leak_fails_with_the_words_of_the_locality_error() -> None:
    program = program_of(leaky(), verify=False)
    with pytest.raises(locc.LocalityError) as expected:
        locc.verify(program)
    with pytest.raises(AssertionError) as found:
        assert_local(program)
    assert str(found.value) == str(expected.value)
    assert "a.linear" in str(found.value)


class Picky(Leaf):
    """Refuses small numbers once it is `strict`."""

    strict = False

    def forward(self, x: Tensor) -> Tensor:
        if self.strict and x.abs().max() < 10:
            raise ValueError("expected large numbers")
        return super().forward(x)


def test_a_check_that_cannot_be_completed_proves_nothing() -> None:
    model = Chain()
    model.a = Picky()
    program = program_of(model)
    model.a.strict = True
    message = r"not proved local: \d of 4 checks could not be completed"
    with pytest.raises(AssertionError, match=message) as found:
        assert_local(program)
    assert "expected large numbers" in str(found.value)
    assert "- sentinel run: " in str(found.value)
    x, y = batch()
    assert assert_local(program, 100 * x, y).complete


@pytest.mark.parametrize(
    "what",
    [
        lambda value: locc.verify(value),
        lambda value: assert_local(value),
        lambda value: assert_isolated(value, torch.zeros(1)),
        lambda value: assert_pipeline_exact(value),
    ],
)
def test_what_is_no_program_is_refused(what: Callable[[Any], None]) -> None:
    with pytest.raises(locc.LoccError, match=r"compiled program was asked for.*found Linear"):
        what(torch.nn.Linear(1, 1))
