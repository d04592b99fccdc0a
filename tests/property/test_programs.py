"""What holds of every program: drawn models, methods, splits, optimizers and schedules.

A falsifying example prints as Python; it stays as an `@example` under its test when its bug is fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import Phase, given, seed, settings

from locc.testing import Case, assert_isolated, assert_local, assert_pipeline_exact, cases

EXAMPLES = settings().max_examples
ROUND = 10

pytestmark = pytest.mark.timeout(1200)  # shrinking a failure takes minutes


def drawn(count: int) -> Callable[[Callable[[Case], None]], Callable[[int], None]]:
    """Turn a check of a case into a test of `count` drawn cases, in rounds.

    Hypothesis makes most examples after the tenth of a run by copying parts of earlier ones: of 200, 126
    differed in more than seeds and sizes, and in rounds of ten 174. Rounds also spread over the workers.
    """

    def decorate(check: Callable[[Case], None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("number", range(count // ROUND))
        def test(number: int) -> None:
            phases = [p for p in settings().phases if p is not Phase.explicit or number == 0]
            run = settings(max_examples=ROUND, phases=phases)(given(cases())(check))
            if settings().derandomize:
                run = seed(number)(run)
            run()

        return test

    return decorate


@drawn(EXAMPLES)
def test_no_clean_program_raises_an_alarm(case: Case) -> None:
    program = case.compile()
    assert program.certificate.complete, program.certificate.warnings
    program.step(*case.batch())
    assert_local(program, *case.batch(1))


@drawn(EXAMPLES // 2)
def test_a_module_trains_in_the_program_as_it_trains_alone(case: Case) -> None:
    program = case.compile(verify=False)
    for phase in [phase.name for phase in program.phases] or [None]:
        program.phase = phase
        assert_isolated(program, *case.batch())
        program.step(*case.batch(1))


@drawn(EXAMPLES // 2)
def test_a_pipeline_is_exact_where_the_certificate_says_so_and_only_there(case: Case) -> None:
    program = case.compile()
    batches = [case.batch(number) for number in range(5)]
    if program.certificate.pipeline_exact:
        assert_pipeline_exact(program, batches)
    else:
        with pytest.raises(AssertionError, match="is not pipeline-exact"):
            assert_pipeline_exact(program, batches)
