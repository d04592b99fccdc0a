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
TRANSFORMER = testing.CONFORMANCE_MODELS["transformer"]


def test_some_methods_are_registered() -> None:
    families = [info.family for info in locc.methods().values()]
    assert len(set(families)) > 1
    assert families.count("proxy") > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", NAMES)
def test_where_the_model_matters_most(method: str) -> None:
    """Every method admits a plain chain, or convolutions."""
    report = testing.assert_conforms(method, checks=EVERYWHERE)
    assert {"mlp", "convolution"} & set(report.admitted)


COSTLY = ("np-sg", "cdni", "pair-proxy", "predsim")


@pytest.mark.parametrize("method", every_method(slow=COSTLY))
def test_on_two_models(method: str) -> None:
    """Where dropout and batch norm are, if the method admits them, and where tokens are."""
    testing.assert_conforms(method, {"usual": usual_case(method), "transformer": TRANSFORMER})


@pytest.mark.parametrize("method", COSTLY)
def test_on_one_model(method: str) -> None:
    testing.assert_conforms(method, {"usual": usual_case(method)})


def test_some_methods_are_pipeline_exact_and_some_are_not() -> None:
    """The check of pipelines has something to compare."""
    missing = {True, False}
    for name in NAMES:
        if missing:
            missing -= {usual_case(name).compile().certificate.pipeline_exact}
    assert not missing
