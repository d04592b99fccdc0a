"""The pytest plugin, in test runs of its own."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

MODELS = """
import pytest
import torch
from torch import nn

import locc

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])


class Reader(nn.Linear):
    def __init__(self, other, leaks):
        super().__init__(4, 3)
        self.others, self.leaks = (other,), leaks

    def forward(self, x):
        return super().forward(x @ self.others[0].weight if self.leaks else x)


def chain(leaks=False):
    first = nn.Linear(4, 4)
    return nn.Sequential(first, Reader(first, leaks))


def compiled(leaks=False, **options):
    return locc.compile(chain(leaks), "dgl", ["0"], verify=False, **options)
"""

UNDER_THE_OPTION = """
@pytest.fixture(scope="module")
def shared():
    return compiled(example_inputs=X)


def test_clean():
    program = compiled(example_inputs=X)
    program.step(X, Y)


def test_nothing_is_seen_of_it():
    model, before = chain(), torch.get_rng_state()
    program = locc.compile(model, "dgl", ["0"], example_inputs=X, verify=False)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(locc.RunError, match="verify=False"):
        program.certificate


def test_uses_the_shared_program(shared):
    shared.step(X, Y)


def test_leak_as_compiled():
    compiled(leaks=True, example_inputs=X)


def test_leak_on_the_first_step():
    compiled(leaks=True).step(X, Y)


def test_leak_after_training():
    program = compiled(example_inputs=X)
    program.model[1].leaks = True
    program.step(X, Y)


def test_leak_in_the_shared_program(shared):
    shared.model[1].leaks = True
    shared.step(X, Y)


def test_failure_of_its_own():
    compiled(leaks=True, example_inputs=X)
    raise ValueError("my own")
"""

A_LOSS_OF_ITS_OWN = """
def loss(output, target):
    return nn.functional.cross_entropy(output, target.get("labels"))


def test_trains(locc_program):
    for program in (locc_program(chain(), "dgl", ["0"], loss=loss, example_inputs=X), compiled(loss=loss)):
        program.step(X, {"labels": Y})


def test_leaks():
    compiled(leaks=True, loss=loss, example_inputs=X)
"""
"""It takes no made-up target: that is a warning, and a leak beside it is an error still."""

WITH_THE_FIXTURE = """
def test_clean(locc_program):
    program = locc_program(chain(), "dgl", ["0"], example_inputs=X)
    assert program.certificate.complete
    program.step(X, Y)


def test_without_example_inputs(locc_program):
    locc_program(chain(), "dgl", ["0"])


def test_leak_as_compiled(locc_program):
    locc_program(chain(leaks=True), "dgl", ["0"], example_inputs=X, verify=False)


def test_leak_after_training(locc_program):
    program = locc_program(chain(), "dgl", ["0"], example_inputs=X)
    program.model[1].leaks = True
    program.step(X, Y)
"""


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # the summary cuts its lines at the terminal's width


def lines(result: pytest.RunResult, *wanted: str) -> None:
    result.stdout.fnmatch_lines_random([f"*{line}*" for line in wanted])


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_the_option_fails_exactly_the_tests_whose_program_leaks(
    pytester: pytest.Pytester, workers: str
) -> None:
    pytester.makepyfile(test_option=MODELS + UNDER_THE_OPTION, test_loss=MODELS + A_LOSS_OF_ITS_OWN)
    result = pytester.runpytest_subprocess(
        "--locc-verify", "-n", workers, "--dist", "loadfile", "-p", "no:cacheprovider"
    )
    # What fails by itself is failed for its own reason; the leak is told at its teardown.
    result.assert_outcomes(passed=4, failed=6, errors=1)
    lines(
        result,
        "FAILED*test_leak_as_compiled - *--locc-verify, as compiled: * is not local*",
        "FAILED*test_leak_on_the_first_step - *--locc-verify, as compiled: *",
        "FAILED*test_leak_after_training - *--locc-verify, after 1 step(s): *",
        "FAILED*test_leak_in_the_shared_program - *--locc-verify, after 2 step(s): *",
        "FAILED*test_failure_of_its_own - ValueError: my own",
        "ERROR*test_failure_of_its_own - *--locc-verify, as compiled: *",
        "'0.weight'",
        "objective '1.loss' of '1' reaches parameter '0.weight'",
        "is not proved local: 2 of 4 checks",
    )


@pytest.mark.slow
def test_without_the_plugin_nothing_is_watched(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(MODELS + UNDER_THE_OPTION)
    result = pytester.runpytest_subprocess("-p", "no:locc", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=7, failed=1)


def test_the_fixture_proves_when_it_compiles_and_at_the_end(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(MODELS + WITH_THE_FIXTURE)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, failed=1, errors=1)
    lines(
        result,
        "FAILED*test_leak_as_compiled - locc.errors.LocalityError: *",
        "ERROR*test_leak_after_training - AssertionError: * is not local*",
    )
