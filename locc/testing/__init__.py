"""The kit for a user's own tests: assertions, random programs, and a pytest plugin.

- `assert_conforms` tests a method, on models of many kinds.
- `assert_local`, `assert_isolated`, `assert_pipeline_exact` test one program.
- `models`, `splits`, `methods`, `batches`, `cases`, `programs` are Hypothesis strategies.
- `ModelSpec` and `Case` are what these draw: values that print as Python; `FAMILIES` lists the kinds.
- With pytest, `--locc-verify` proves every program of a test run local, and the fixture `locc_program`
  compiles one (`locc.testing.plugin`).

Only the strategies need Hypothesis; `pip install locc[testing]` brings it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from locc.errors import LoccError
from locc.testing.case import Case
from locc.testing.checks import CONFORMANCE
from locc.testing.conformance import CONFORMANCE_MODELS, Conformance, assert_conforms
from locc.testing.families import FAMILIES, ModelSpec
from locc.testing.isolation import assert_isolated
from locc.testing.local import assert_local
from locc.testing.pipeline import assert_pipeline_exact
from locc.testing.reference import reference_step
from locc.testing.translation import assert_lowered, assert_side_by_side

if TYPE_CHECKING:
    from locc.testing.strategies import batches, cases, methods, models, programs, splits

STRATEGIES = ("batches", "cases", "methods", "models", "programs", "splits")

__all__ = [
    "CONFORMANCE",
    "CONFORMANCE_MODELS",
    "FAMILIES",
    "Case",
    "Conformance",
    "ModelSpec",
    "assert_conforms",
    "assert_isolated",
    "assert_local",
    "assert_lowered",
    "assert_pipeline_exact",
    "assert_side_by_side",
    "batches",
    "cases",
    "methods",
    "models",
    "programs",
    "reference_step",
    "splits",
]


def __getattr__(name: str) -> Any:
    if name not in STRATEGIES:
        raise AttributeError(f"module 'locc.testing' has no attribute '{name}'")
    try:
        strategies = importlib.import_module("locc.testing.strategies")
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise LoccError(
            f"locc.testing.{name} is a Hypothesis strategy, and Hypothesis is not installed; "
            "run `pip install locc[testing]`"
        ) from error
    return getattr(strategies, name)
