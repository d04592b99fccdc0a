"""Leaks planted in user models: each is caught by name before training, by the check that should see it."""

from __future__ import annotations

import warnings

import pytest
import torch

import locc
from locc.verify import sentinel, static, storage, walk
from locc.verify.batch import small_batch
from locc.verify.findings import SENTINEL, WALK

from . import leaks
from .leaks import Chain, Stashing

STALE = "tape of 'b' in an earlier step"
CASES = {
    # leak: (the check that must see it, what the message must name)
    "reads_stash": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight', which module 'a' owns"),
    "reads_previous_stash": (WALK, STALE),
    "reads_foreign_previous": (
        WALK,
        "'a.linear.weight', which module 'a' owns, through a value that was kept",
    ),
    "live_buffer": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight'"),
    "history_buffer": (WALK, STALE),
    "foreign_weight": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight'"),
    "no_grad_wrong_line": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight'"),
    "straight_through": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight'"),
    "inplace_after_detach": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight'"),
    "view_copy_after_detach": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight'"),
    "reads_own_then_foreign_module": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight'"),
    "checkpoint_non_reentrant": (WALK, "'b.loss' of 'b' reaches parameter 'a.linear.weight'"),
    "checkpoint_reentrant": (
        SENTINEL,
        "backward pass of objective 'b.loss' of 'b' writes the gradient of parameter",
    ),
    "custom_function": (
        SENTINEL,
        "'b.loss' of 'b' writes the gradient of parameter 'a.linear.weight', which module 'a'",
    ),
    "tensor_hook": (
        SENTINEL,
        "'b.loss' of 'b' writes the gradient of parameter 'a.linear.weight', which module 'a'",
    ),
    "forward_write": (SENTINEL, "the forward of 'b' writes the gradient of parameter 'a.linear.weight'"),
    "data_alias_parameter": (
        SENTINEL,
        "the forward of 'b' changes parameter 'a.linear.weight', which module 'a' owns",
    ),
    "data_alias_activation": (SENTINEL, "the forward of 'b' changes 'a', a value of 'a', in place"),
    "foreign_buffer": (SENTINEL, "the forward of 'b' changes buffer 'a.shared', which module 'a' owns"),
}
HARMLESS = [
    "reads_detached_stash",
    "keeps_detached",
    "keeps_live_unread",
    "detached_buffer",
    "detached_weight",
    "no_grad_right_line",
    "own_straight_through",
    "own_checkpoint_reentrant",
    "own_checkpoint",
    "own_hook",
    "own_inplace",
    "own_data_clamp",
    "own_custom_function",
]


def _model(name: str) -> Chain:
    torch.manual_seed(0)
    return Chain(getattr(leaks, name), Stashing())


def _compile(model: Chain, **options: object) -> locc.Program:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    return locc.compile(model, "dgl", ["a", "b", "c"], example_inputs=x, **options)  # type: ignore[arg-type]


def _state(program: locc.Program) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in program.root.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_compile_refuses_a_leak_by_name_and_leaves_the_model_alone(name: str) -> None:
    check, text = CASES[name]
    model = _model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(locc.LocalityError, match="method 'dgl' is not local") as caught:
            _compile(model)
    assert text in str(caught.value)
    assert {finding.check for finding in caught.value.findings} == {check}
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert not hasattr(model.b, "kept")
    assert model.a.last is None


@pytest.mark.parametrize("name", CASES)
def test_a_leak_that_appears_in_a_live_program_is_caught(name: str) -> None:
    check, text = CASES[name]
    model = _model(name)
    model.b.active = False
    program = _compile(model)
    assert program.certificate.complete
    model.b.active = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(locc.LocalityError) as caught:
            locc.verify(program)
    assert text in str(caught.value)
    assert f"found by {check}" in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_the_sentinel_alone_sees_every_leak_and_the_graph_none(name: str) -> None:
    """The checks are independent: what the walk sees first, the sentinel sees as well."""
    model = _model(name)
    model.b.active = False
    program = _compile(model)
    model.b.active = True
    ir = program.ir
    batch = small_batch(ir, ir.captured.example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sentinel.check(ir, program.optimizers, batch)
    assert found.findings
    assert not static.check(ir)
    assert not storage.check(ir, program.optimizers)
    assert all(f.check == SENTINEL for f in found.findings)


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_look_alike_passes(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = _compile(_model(name))
    assert program.certificate.complete
    assert program.certificate.verdict == "strictly modular"
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    program.step(x, y)
    program.step(x, y)


def test_the_path_names_the_line_of_the_users_code() -> None:
    with pytest.raises(locc.LocalityError, match=r"path: b\.loss <- .*leaks\.py:\d+.* <- a\.linear\.weight"):
        _compile(_model("reads_stash"))


def test_a_model_that_needs_data_is_walked_on_real_tensors_and_says_so() -> None:
    def branching(m: leaks.Planted, x: torch.Tensor) -> torch.Tensor:
        return leaks.plain(m, x) * (1.0 if float(x.detach().abs().sum()) >= 0 else 2.0)

    torch.manual_seed(0)
    program = _compile(Chain(branching, Stashing()))
    (check,) = [c for c in program.certificate.checks if c.name == WALK]
    assert "tiny real tensors, since fake ones do not run" in check.detail
    assert program.certificate.complete


def test_a_leak_behind_data_dependent_code_is_caught_on_real_tensors() -> None:
    def branching(m: leaks.Planted, x: torch.Tensor) -> torch.Tensor:
        return leaks.reads_stash(m, x) if float(x.detach().abs().sum()) >= 0 else leaks.plain(m, x)

    torch.manual_seed(0)
    with pytest.raises(
        locc.LocalityError, match=r"reaches parameter 'a\.linear\.weight'.*found by autograd walk"
    ):
        _compile(Chain(branching, Stashing()))


def test_the_walk_runs_without_data_by_default() -> None:
    program = _compile(_model("own_straight_through"))
    ir = program.ir
    assert walk.check(ir, small_batch(ir, ir.captured.example)).how == "fake tensors (meta)"
