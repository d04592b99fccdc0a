"""The pytest plugin `locc`: an option that proves every program of a test run, and a fixture that proves one.

Installing locc activates it; `-p no:locc` leaves it out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import pytest

import locc
from locc.errors import LoccError

if TYPE_CHECKING:  # pytest imports this at every start: PyTorch only where the plugin is used
    from torch import nn

    from locc.program import Program
    from locc.request import Splits
    from locc.rewrite import Method
    from locc.runtime import Compiled


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--locc-verify`."""
    parser.getgroup("locc").addoption(
        "--locc-verify",
        action="store_true",
        help="prove every locc program of a test local, and once more after the test if it took steps",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Watch the programs of this run where the option asks for it."""
    if config.getoption("--locc-verify"):
        config.pluginmanager.register(Watch(), "locc-verify")


class Watch:
    """Proves programs local behind the back of the tests.

    A program is proved when its compilation is complete, and after the test if it took steps; that of a
    fixture with a wider scope after every test in which it took some. The programs of a test are kept
    until it ends. A test sees nothing of it: programs stay as they are, without the new certificate.
    """

    def __init__(self) -> None:
        self.held: list[Compiled] = []
        self.proved: WeakKeyDictionary[Compiled, int] = WeakKeyDictionary()
        self.failures: list[str] = []
        from locc.runtime.program import observers

        self.observers = observers
        observers.append(self.completed)

    def pytest_unconfigure(self) -> None:
        """Watch no longer."""
        self.observers.remove(self.completed)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, Any, Any]:
        """Fail a test that passed but for a program that is not local."""
        result = yield
        self.settle()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Generator[None, Any, Any]:
        """Report what a failed or skipped test has left, and let its programs go."""
        try:
            return (yield)
        finally:
            try:
                self.settle()
            finally:
                self.held.clear()

    def completed(self, program: Compiled) -> None:
        """Keep a program until its test ends."""
        self.held.append(program)
        self.prove(program)

    def prove(self, program: Compiled) -> None:
        """Prove a program local, and note a failure."""
        self.proved[program] = program.steps
        certificate = program.built.certificate
        try:
            prove(program)
        except (AssertionError, LoccError) as error:
            when = f"after {program.steps} step(s)" if program.steps else "as compiled"
            self.failures.append(f"--locc-verify, {when}: {error}")
        finally:
            program.built.certificate = certificate

    def settle(self) -> None:
        """Prove again what took steps, then fail for everything noted."""
        for program, steps in list(self.proved.items()):
            if program.steps != steps:
                self.prove(program)
        failures, self.failures = self.failures, []
        if failures:
            pytest.fail("\n\n".join(failures), pytrace=False)


def prove(program: Compiled) -> None:
    """Prove a program local; where only its loss could not be examined, warn: no target is known here.

    Raises:
        AssertionError: the program is not local, or a check could not be completed.
    """
    from locc.testing.local import assert_local

    try:
        assert_local(program)
    except AssertionError as error:
        unfinished = error.__cause__ is not None or program.built.certificate is None
        if unfinished or any(c.status == "incomplete" for c in program.certificate.checks):
            raise
        warnings.warn(str(error), stacklevel=2)


@pytest.fixture
def locc_program() -> Iterator[Callable[..., Program]]:
    """Return a function that compiles as `locc.compile` does, and proves.

    `locc_program(model, method, splits, **options)` proves the program local as it compiles it. After
    the test, whatever that trained, every program made in this way must still be local.
    """
    made: list[Program] = []

    def build(model: nn.Module, method: str | Method = "bp", splits: Splits = (), **options: Any) -> Program:
        made.append(locc.compile(model, method, splits, **options | {"verify": True}))
        return made[-1]

    yield build
    for program in made:
        if program._built is not None:
            prove(program)
