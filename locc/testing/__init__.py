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

from typing import TYPE_CHECKING, Any

from locc.errors import LoccError
from locc.lazy import lazily

if TYPE_CHECKING:
    from locc.testing.case import OPTIMIZERS, Case
    from locc.testing.checks import CONFORMANCE
    from locc.testing.conformance import CONFORMANCE_MODELS, Conformance, assert_conforms
    from locc.testing.families import FAMILIES, ModelSpec
    from locc.testing.isolation import assert_isolated
    from locc.testing.local import assert_local
    from locc.testing.pipeline import assert_pipeline_exact
    from locc.testing.reference import reference_step
    from locc.testing.strategies import batches, cases, methods, models, programs, splits
    from locc.testing.translation import assert_lowered, assert_side_by_side

__all__ = [
    "CONFORMANCE",
    "CONFORMANCE_MODELS",
    "FAMILIES",
    "OPTIMIZERS",
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


_HOMES = {
    "CONFORMANCE": "checks",
    "CONFORMANCE_MODELS": "conformance",
    "FAMILIES": "families",
    "OPTIMIZERS": "case",
    "Case": "case",
    "Conformance": "conformance",
    "ModelSpec": "families",
    "assert_conforms": "conformance",
    "assert_isolated": "isolation",
    "assert_local": "local",
    "assert_lowered": "translation",
    "assert_pipeline_exact": "pipeline",
    "assert_side_by_side": "translation",
    "batches": "strategies",
    "cases": "strategies",
    "methods": "strategies",
    "models": "strategies",
    "programs": "strategies",
    "reference_step": "reference",
    "splits": "strategies",
}

if not TYPE_CHECKING:
    _get, __dir__ = lazily(__name__, {name: f"{__name__}.{home}" for name, home in _HOMES.items()})

    def __getattr__(name: str) -> Any:
        try:
            return _get(name)
        except ModuleNotFoundError as error:
            if error.name != "hypothesis":
                raise
            raise LoccError(
                f"locc.testing.{name} is a Hypothesis strategy, and Hypothesis is not installed; "
                "run `pip install locc[testing]`"
            ) from error
