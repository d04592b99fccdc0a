"""What holds of every program: drawn models (frozen, tied, parametrised), methods, splits, sizes and so on.

A falsifying example prints as Python; it stays as an `@example` under its test when its bug is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, example, given, reject, seed, settings

from locc import LoccError, Program, RunError
from locc.ir import Inputs
from locc.testing import (
    OPTIMIZERS,
    Case,
    ModelSpec,
    assert_isolated,
    assert_local,
    assert_lowered,
    assert_pipeline_exact,
    cases,
)

EXAMPLES = settings().max_examples
ROUND = 10
LONGER = 2  # by so much, where lengths may vary

pytestmark = [
    pytest.mark.timeout(1200),  # shrinking a failure takes minutes
    pytest.mark.usefixtures("visits_and_records_on_the_cpu"),
]


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


@drawn(EXAMPLES * 2 // 3)
def test_no_clean_program_raises_an_alarm(case: Case) -> None:
    program = case.compile()
    assert program.certificate.complete, program.certificate.warnings
    program.step(*case.batch())
    assert_local(program, *case.batch(1))


@drawn(EXAMPLES // 3)
def test_a_module_trains_in_the_program_as_it_trains_alone(case: Case) -> None:
    program = case.compile(verify=False)
    for phase in [phase.name for phase in program.phases] or [None]:
        program.phase = phase
        assert_isolated(program, *case.batch())
        program.step(*case.batch(1))


@drawn(EXAMPLES // 3)
def test_a_pipeline_is_exact_where_the_certificate_says_so_and_only_there(case: Case) -> None:
    program = case.compile()
    batches = [case.batch(number) for number in range(5)]
    if program.certificate.pipeline_exact:
        assert_pipeline_exact(program, batches)
    else:
        with pytest.raises(AssertionError, match="is not pipeline-exact"):
            assert_pipeline_exact(program, batches)


@drawn(EXAMPLES * 2 // 3)
@example(Case(ModelSpec("chain", ("weight_norm_hook",)), "dfa", {"zero_init": True}))  # was 0/0
@example(  # the output's target trained nothing
    Case(ModelSpec("auxiliary", ("tanh",), frozen=("head",)), "ddtp-linear", splits=("stem", "blocks.0"))
)
@example(  # two modules share a frozen weight, and its matrix
    Case(
        ModelSpec("auxiliary", ("batch_norm",) * 2, frozen=("blocks.0", "blocks.1"), shared=True),
        "ss-brsf",
        splits=("blocks.0", "blocks.1"),
    )
)
@example(  # the reference ran a repeated region twice, and a buffer in it moved twice
    Case(ModelSpec("chain", ("tanh", "running_mean")), "altmin", splits=("stem", "blocks.0"))
)
@example(  # a tangent read a lent parameter as one of its own
    Case(
        ModelSpec("convolution", ("relu", "relu"), shared=True),
        "ifa",
        splits=("stem", "blocks.0", "blocks.1"),
    )
)
def test_a_step_is_what_its_graph_means_and_under_bp_what_autograd_makes_of_it(case: Case) -> None:
    try:
        _assert_numbers_agree(case)
    except RunError:  # training may diverge, if not at the first step
        case.compile(verify=False).step(*case.batch())
        reject()


def _assert_numbers_agree(case: Case) -> None:
    tied = "owner" if case.method == "bp" else case.tied
    case = replace(case, model=replace(case.model, dtype=torch.float64), tied=tied)
    program = case.compile(verify=False)
    frozen = {n: p.clone() for n, p in program.model.named_parameters() if not p.requires_grad}
    sizes = (0, LONGER, 0) if case.dynamic else (0, 0)
    for phase in [phase.name for phase in program.phases] or [None]:
        program.phase = phase
        for more in set(sizes):
            assert_lowered(program, *case.batch(more=more))
    if case.dynamic and not isinstance(case.splits, int):
        _assert_a_size_is_as_good_as_fixed(case, program)
    if case.method == "bp" and "dropout" not in case.model.blocks:
        _assert_autograd_agrees(case, program, sizes)
    else:
        for number, more in enumerate(sizes):
            program.step(*case.batch(number, more))
    for name, parameter in program.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), f"'{name}' is frozen and moved"


def _assert_autograd_agrees(case: Case, program: Program, sizes: tuple[int, ...]) -> None:
    eager = case.model.build()
    optimizer = OPTIMIZERS[case.optimizer](p for p in eager.parameters() if p.requires_grad)
    for number, more in enumerate(sizes):
        x, y = case.batch(number, more)
        inputs = Inputs.of(eager, x)
        found = program.step(x, y)
        loss = program.loss_function(eager(*inputs.args, **inputs.kwargs), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    _assert_states_agree(program.model, eager)


def _assert_a_size_is_as_good_as_fixed(case: Case, free: Program) -> None:
    x, y = case.batch(9, LONGER)
    fixed = replace(case, dynamic=False).compile(verify=False, example_inputs=x)
    free = case.compile(verify=False)
    if fixed.root.state_dict().keys() != free.root.state_dict().keys():
        return  # gim predicts as many positions ahead as the example has
    fixed.root.load_state_dict(free.root.state_dict())
    one, other = fixed.step(x, y), free.step(x, y)
    torch.testing.assert_close(one.objectives, other.objectives, rtol=1e-10, atol=1e-12)
    _assert_states_agree(free.root, fixed.root)


def _assert_states_agree(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-11)


def fused(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer that steps which are recorded can have."""
    return torch.optim.Adam(parameters, lr=0.003, fused=True)


RECORDED = {"backend": "cudagraphs", "optimizer": fused}
WAYS: list[dict[str, object]] = [
    {"schedule": "wave"},
    {"schedule": "wave", "backend": "vmap"},
    {"schedule": "replay", "buffer": 0},
    {"schedule": "pipelined"},
    {"update": "in_backward"},
    {"recompute": True},
    {"offload": "disk"},
    {"offload": "cpu"},
    RECORDED,
    RECORDED | {"schedule": "wave"},
    {"schedule": "wave", "recompute": True, "update": "in_backward"},
    {"features": "memory", "schedule": "sequential"},
]
"""Orders of the same tasks, and places for them."""


@drawn(ROUND if settings().derandomize else EXAMPLES * 2 // 3)
def test_another_order_or_place_ends_with_the_bits_of_lockstep(case: Case) -> None:
    case = replace(case, model=replace(case.model, dtype=torch.float64), schedule="lockstep")
    draw = torch.Generator().manual_seed(case.seed)
    for number in torch.randperm(len(WAYS), generator=draw)[:3].tolist():
        way = WAYS[number]
        if way.get("schedule") == "wave":
            way = {**way, "batches": int(torch.randint(1, 7, (), generator=draw))}
        try:
            program = case.compile(verify=False, **way)
        except LoccError:
            continue  # refused, in a sentence
        order = "sequential" if "features" in way else "lockstep"
        given = {"optimizer": way["optimizer"]} if "optimizer" in way else {}
        plain = case.compile(verify=False, schedule=order, **given)
        one, other = _trained(case, plain), _trained(case, program)
        bits = {"rtol": 0.0, "atol": 0.0} if way.get("backend") != "vmap" else {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(other, one, **bits, equal_nan=True, msg=lambda m, w=way: f"{w}: {m}")


def _trained(case: Case, program: Program) -> object:
    """Train on a few batches, one of another length where these vary; return what is then kept, by name."""
    longer = [LONGER if case.dynamic and number == 2 else 0 for number in range(5)]
    try:
        program.fit([case.batch(number, more) for number, more in enumerate(longer)], progress=False)
    except RunError:
        return {}  # it diverges, whatever the order
    learners = {name: optimizer.state_dict() for name, optimizer in program.optimizers.items()}
    return {**program.root.state_dict(), "optimizers": learners}
