"""What a project that trains locally may want to hold on to."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model import build

import locc
from locc import testing


def test_training_stays_local(locc_program) -> None:  # the fixture verifies again when the test is over
    model, x = build()
    program = locc_program(model, "dgl", ["blocks.*"], example_inputs=x)
    for _ in range(3):
        program.step(torch.randn(16, 1, 8, 8), torch.randint(10, (16,)))
    assert program.certificate.verdict == "strictly modular"


def test_each_module_trains_as_it_would_alone() -> None:
    model, x = build()
    program = locc.compile(model, "predsim", ["blocks.*"], example_inputs=x)
    testing.assert_isolated(program, x, torch.randint(10, (len(x),)))


def test_a_pipeline_would_train_the_same_network() -> None:
    model, x = build()
    testing.assert_pipeline_exact(locc.compile(model, "dgl", ["blocks.*"], example_inputs=x))


@settings(max_examples=10, deadline=None)
@given(splits=testing.splits(*build()), method=st.sampled_from(["dgl", "predsim"]))
def test_it_is_local_wherever_it_is_cut(splits: tuple[str, ...], method: str) -> None:
    model, x = build()
    testing.assert_local(locc.compile(model, method, splits, example_inputs=x, verify=False))
