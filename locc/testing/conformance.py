"""The assertion that a method keeps to what every method has to, on models of many kinds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from locc import registry
from locc.errors import LoccError, nearest
from locc.rewrite import Method, configure

from .case import Case
from .checks import CONFORMANCE, Subject
from .families import ModelSpec

UNDEFINED, FEWEST = "undefined on this model: ", 20
"""What a refusal begins with, and the least number of characters that can say why."""


def _case(family: str, *blocks: str, optimizer: str = "momentum") -> Case:
    return Case(ModelSpec(family, blocks), splits=("blocks.0", "blocks.1"), batch_size=8, optimizer=optimizer)


CONFORMANCE_MODELS: Mapping[str, Case] = {
    "mlp": _case("chain", "tanh", "tanh"),
    "norm": _case("chain", "batch_norm", "dropout"),
    "convolution": _case("convolution", "batch_norm", "relu"),
    "residual": _case("residual", "tanh", "layer_norm"),
    "recurrent": _case("recurrent", "lstm", "gru"),
    "transformer": _case("attention", "attention", "attention", optimizer="adam"),
}
"""The models of `assert_conforms`, three modules each; a case's method is replaced by the one under test."""


@dataclass(frozen=True)
class Conformance:
    """What `assert_conforms` has found of a method.

    Attributes:
        method: its id, or the name of its class.
        admitted: the models on which every check held.
        refused: model -> the sentence with which the method refuses it.
        checks: the names of the checks that ran on each admitted model.
    """

    method: str
    admitted: tuple[str, ...]
    refused: Mapping[str, str]
    checks: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"method '{self.method}' conforms: {len(self.checks)} checks on {', '.join(self.admitted)}"]
        lines += [f"- {check}" for check in self.checks]
        lines += [f"refuses '{model}': {why}" for model, why in self.refused.items()]
        return "\n".join(lines)


def assert_conforms(
    method: str | type[Method] | Method,
    models: Mapping[str, Case] | None = None,
    checks: Iterable[str] | None = None,
) -> Conformance:
    """Assert that a method keeps to what locc, and every user of it, relies on.

    Compiles and trains it on each model that it admits, and runs the checks of `CONFORMANCE` there: each
    module trains in every phase as it would alone, to the same bits; inference is the user's model; a
    checkpoint resumes; and so on. What the method computes is for a test of its own, against its formulas.

    Example:
        >>> print(locc.testing.assert_conforms(MonoForward(gain=0.5)))

    Args:
        method: the id of a registered method, a class whose options have defaults, or a configured method.
        models: name -> case, whose method and options are not used; `CONFORMANCE_MODELS` without it.
        checks: names of `CONFORMANCE`; all of them without.

    Returns:
        Which models were admitted, with what sentence the others were refused, which checks ran.

    Raises:
        AssertionError: some checks do not hold, each named with its model and what to do; or the method
            admits none of the models.
        LoccError: there is no such method or check, or the method needs options.
    """
    chosen, name = _configured(method)
    names = _known(checks)
    cases = CONFORMANCE_MODELS if models is None else models
    refused: dict[str, str] = {}
    failures: list[str] = []
    for model, case in cases.items():
        subject = Subject(model, replace(case, method=chosen, options={}))
        try:
            reason = refusal(subject)
            if reason is not None:
                refused[model] = reason
        except AssertionError as error:
            failures.append(f"model '{model}': {error}")
        else:
            failures += _failures(subject, names) if reason is None else []
    if failures:
        raise AssertionError(f"method '{name}' does not conform:" + "".join(f"\n- {f}" for f in failures))
    admitted = tuple(model for model in cases if model not in refused)
    if not admitted:
        reasons = "".join(f"\n- model '{model}': {why}" for model, why in refused.items())
        raise AssertionError(
            f"method '{name}' admits none of {len(cases)} models, so nothing was tested{reasons}\n"
            "  remedy: give models that it admits, assert_conforms(method, models={name: Case(...)})"
        )
    return Conformance(name, admitted, refused, names)


def _configured(method: str | type[Method] | Method) -> tuple[Method, str]:
    if isinstance(method, str):
        return registry.method(method), method
    if isinstance(method, type):
        method = configure(method.__name__, method, {})
    return method, registry.name_of(method)


def _known(checks: Iterable[str] | None) -> tuple[str, ...]:
    names = tuple(CONFORMANCE) if checks is None else tuple(checks)
    for name in names:
        if name not in CONFORMANCE:
            raise LoccError(f"there is no check '{name}'; {nearest(name, CONFORMANCE)}")
    return names


def refusal(subject: Subject) -> str | None:
    """Return the sentence with which the method refuses the model, or None where it admits it.

    Raises:
        AssertionError: it fails in another way, or says too little.
    """
    try:
        reason = subject.case.refusal()
    except LoccError as error:
        raise AssertionError(
            f"it does not compile: {type(error).__name__}: {error}\n  remedy: correct the pass, or let "
            "`requires` refuse what the method cannot do"
        ) from error
    if reason is not None and ("\n" in reason or len(reason.partition(UNDEFINED)[2]) < FEWEST):
        raise AssertionError(
            f"it is refused with {reason!r}; let `requires` say in one sentence what was found and what to do"
        )
    return reason


def _failures(subject: Subject, checks: Iterable[str]) -> Iterator[str]:
    for check in checks:
        try:
            CONFORMANCE[check](subject)
        except (AssertionError, LoccError) as error:
            yield f"model '{subject.name}', {check}: {error}"
        except Exception as error:
            error.add_note(f"while checking '{check}' on model '{subject.name}'")
            raise
