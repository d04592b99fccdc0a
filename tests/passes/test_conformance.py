"""What METHODS.md section H asks of every method, over every method that is registered; names none."""

from __future__ import annotations

import pytest

import locc
from locc import testing
from support import every_method, usual_case

NAMES = sorted(locc.methods())
EVERYWHERE = (
    "one module is backpropagation",
    "every parameter moves",
    "the plan computes what the graph means",
    "module programs train side by side",
    "modules are local",
)
THOROUGHLY = [check for check in testing.CONFORMANCE if check not in EVERYWHERE]


def test_some_methods_are_registered() -> None:
    families = [info.family for info in locc.methods().values()]
    assert len(set(families)) > 1
    assert families.count("proxy") > 1


@pytest.mark.parametrize("method", every_method())
def test_on_every_model(method: str) -> None:
    """The checks in which the model matters most; every method admits a plain chain, or convolutions."""
    report = testing.assert_conforms(method, checks=EVERYWHERE)
    assert {"mlp", "convolution"} & set(report.admitted)


@pytest.mark.parametrize("method", every_method())
def test_thoroughly_on_two(method: str) -> None:
    """Every other check, where dropout and batch norm are, if it admits them, and where tokens are."""
    models = {"usual": usual_case(method), "transformer": testing.CONFORMANCE_MODELS["transformer"]}
    testing.assert_conforms(method, models, checks=THOROUGHLY)


def test_some_methods_are_pipeline_exact_and_some_are_not() -> None:
    """The check of pipelines has something to compare."""
    programs = (usual_case(name).compile() for name in NAMES)
    assert {program.certificate.pipeline_exact for program in programs} == {True, False}
