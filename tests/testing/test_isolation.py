"""`assert_isolated`: holds for every method, and sees what is local in its gradients but not isolated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.testing import isolation, perturb
from locc.testing.isolation import assert_isolated
from support import Tied, every_method, usual_case

from .planted import (
    CLASSES,
    Chain,
    Langevin,
    Leaf,
    NoisyLeaf,
    Residual,
    Sharing,
    batch,
    everything,
    program_of,
)


@pytest.mark.parametrize("method", ["dgl", "dtp"])
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 3, "clip": 0.5},
        {"autocast": "bfloat16"},
        {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1)},
    ],
    ids=["accumulate and clip", "autocast", "momentum"],
)
def test_under_every_setting(method: str, options: dict[str, Any]) -> None:
    program = program_of(Residual(), method, splits=["stem", "one", "two"], **options)
    program.step(*batch())
    assert_isolated(program, *batch(seed=8))


@pytest.mark.parametrize("method", ["dgl", "predsim"])
def test_in_every_stage_of_the_sequential_schedule(method: str) -> None:
    program = program_of(Residual(), method, splits=["one", "two"], schedule="sequential")
    for phase in program.phases:
        program.phase = phase.name
        assert_isolated(program, *batch())


@pytest.mark.parametrize("tied", ["owner", "copy"])
@pytest.mark.parametrize("method", ["dgl", "bp"])
def test_with_a_tied_parameter_and_noisy_updates(method: str, tied: str) -> None:
    """Under "owner", the embedding is updated after the head has read it: the noise is still its own."""
    tokens = torch.arange(6) % 5
    program = program_of(
        Tied(),
        method,
        splits=["embed", "mid"],
        example_inputs=tokens,
        tied=tied,
        optimizer=lambda ps: Langevin(ps, lr=0.1),
    )
    assert_isolated(program, tokens, tokens.flip(0))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_a_shared_buffer_is_a_declared_coupling(first: bool, swapped: bool) -> None:
    program = program_of(Sharing(first, swapped), splits=["one", "two"])
    assert program.certificate.couplings
    assert not program.certificate.pipeline_exact
    assert_isolated(program, *batch())
    silent = replace(program.certificate, couplings=())
    program.built.certificate = silent
    if first:  # nothing goes down but by the buffer
        assert_isolated(program, *batch())
        return
    with pytest.raises(
        AssertionError, match=r"module 'one' is not isolated from objective 'two.*two updates"
    ):
        assert_isolated(program, *batch())


@pytest.mark.parametrize("method", ["dgl", "bp", "dtp"])
def test_noise_in_backward_passes_and_updates_is_a_modules_own(method: str) -> None:
    model = Chain()
    model.a, model.b, model.c = NoisyLeaf(), NoisyLeaf(), NoisyLeaf()
    assert_isolated(program_of(model, method, optimizer=lambda ps: Langevin(ps, lr=0.1)), *batch())


@pytest.mark.parametrize(
    "act",
    [
        lambda own: own.last.mean(0) if own.last is not None else 0.0,
        lambda own: 0.1 * own.calls,
        lambda own: own.mean,
    ],
    ids=["stash", "counter", "buffer"],
)
def test_what_a_module_keeps_for_itself_is_its_own(act: Any) -> None:
    program = program_of(Chain(act, of="none"))
    program.step(*batch())
    assert_isolated(program, *batch(seed=8))


# ---- not isolated ---------------------------------------------------------------------------


SHELF: list[Tensor] = []


class Shelving(Leaf):
    """Puts what it computes into a global."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        SHELF.append(h.detach())
        return h


def from_shelf() -> Chain:
    model = Chain(lambda other: SHELF[-1] if SHELF else 0.0)
    model.a = Shelving()
    return model


PLANTS: dict[str, tuple[Callable[[], Chain], str]] = {
    "a detached stash": (lambda: Chain(lambda other: other.last), "something that module 'a' leaves"),
    "a counter": (lambda: Chain(lambda other: 0.1 * other.calls), "something that module 'a' leaves"),
    "a detached global": (from_shelf, "something that module 'a' leaves"),
    "a buffer that changes": (
        lambda: Chain(lambda other: other.mean),
        "it reads buffer 'a.mean', which module 'a' owns",
    ),
    "a constant buffer": (
        lambda: Chain(lambda other: other.constant),
        "it reads buffer 'a.constant', which module 'a' owns",
    ),
    "a buffer of whole numbers": (
        lambda: Chain(lambda other: 0.1 * other.order),
        "it reads buffer 'a.order', which module 'a' owns",
    ),
    "a detached weight": (
        lambda: Chain(lambda other: other.linear.weight.detach()[0]),
        "it reads parameter 'a.linear.weight', which module 'a' owns",
    ),
    "a weight of a later module": (
        lambda: Chain(lambda other: other.linear.weight.detach()[0], of="c"),
        "it reads parameter 'c.linear.weight', which module 'c' owns",
    ),
    "a stash of a later module": (
        lambda: Chain(lambda other: 0.0 if other.last is None else other.last.mean(0), of="c"),
        "something that module 'c' leaves",
    ),
}


@pytest.mark.parametrize("method", ["dgl", "bp"])
@pytest.mark.parametrize("plant", PLANTS)
def test_what_passes_beside_the_boundaries_is_found(plant: str, method: str) -> None:
    SHELF.clear()
    build, suspect = PLANTS[plant]
    program = program_of(build(), method)
    assert program.certificate.complete  # local as far as gradients go
    program.step(*batch(seed=8))
    before = everything(program)
    with pytest.raises(AssertionError, match=r"module 'b' is not isolated: trained alone") as found:
        assert_isolated(program, *batch())
    assert suspect in str(found.value)
    assert everything(program) == before
    assert_isolated(program, *batch(), owners=["a"])


def test_a_live_leak_is_found_where_nothing_was_verified() -> None:
    model = Chain(lambda other: other.linear.weight[0])
    program = program_of(model, "bp", verify=False)
    with pytest.raises(AssertionError, match=r"module 'a' is not isolated.*\n.*beside 'b'"):
        assert_isolated(program, *batch())
    assert program.built.certificate is None


def test_an_optimizer_that_moves_foreign_parameters_is_found() -> None:
    program = program_of(Chain())
    a = program.model.a.linear.weight
    program.optimizers["c"].register_step_post_hook(lambda *_: a.data.mul_(0.99))
    with pytest.raises(
        AssertionError, match=r"module 'a'.*'a.linear.weight'.*comes out different\n.*beside 'c'"
    ):
        assert_isolated(program, *batch())


def test_a_module_that_changes_its_input_for_others_is_found() -> None:
    """Every module of dgl reads the labels: the first of them turns them round."""

    def turning(output: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(output, target.clone())
        target.copy_(target.flip(0))
        return loss

    program = program_of(Chain(), loss=turning, verify=False)
    x, y = batch()
    kept = y.clone()
    with pytest.raises(AssertionError, match=r"module 'b' is not isolated"):
        assert_isolated(program, x, y)
    assert torch.equal(y, kept)


def altered(program: locc.Program, drop: Callable[[Any], bool]) -> None:
    """Take flows out of a program's certificate."""
    certificate = program.certificate
    program.built.certificate = replace(certificate, flows=tuple(f for f in certificate.flows if not drop(f)))


@pytest.mark.parametrize("what", list(perturb.DISTURBANCES))
def test_every_disturbance_reaches_what_a_certificate_hides(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "DISTURBANCES", {what: perturb.DISTURBANCES[what]})
    program = program_of(Chain(), "bp")
    assert_isolated(program, *batch())
    altered(program, lambda f: (f.producer, f.consumer) == ("c", "b") and f.kind == "gradient")
    message = rf"module 'b' is not isolated from objective 'head\..*with {what}.*after one update"
    with pytest.raises(AssertionError, match=message):
        assert_isolated(program, *batch(), owners=["b"])
    # Adam would undo the scaling of a gradient before anybody sees it.
    program = program_of(Chain(), "dgl", optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    assert_isolated(program, *batch())
    altered(program, lambda f: (f.producer, f.consumer) == ("b", "c"))
    message = rf"module 'c' is not isolated from objective 'a\..*with {what}.*after two updates"
    with pytest.raises(AssertionError, match=message):
        assert_isolated(program, *batch(), owners=["c"])


@pytest.mark.parametrize("method", every_method())
def test_a_certificate_without_flows_holds_for_no_method(method: str) -> None:
    """What every method's flows declare does happen: the comparison is not of equals by themselves."""
    case = usual_case(method)
    program = case.compile()
    if not program.ir.objectives():
        pytest.skip("it has no objective to disturb: what trains is set by formulas")
    altered(program, lambda f: True)
    with pytest.raises(AssertionError, match=r"is not isolated from objective"):
        assert_isolated(program, *case.batch())


def test_a_program_whose_objectives_are_not_finite_is_not_called_isolated() -> None:
    """Everything would be NaN, and so the same."""
    program = program_of(Chain())
    x, y = batch()
    for check in (lambda: assert_isolated(program, x * torch.nan, y), lambda: program.step(x * torch.nan, y)):
        with pytest.raises(locc.RunError, match=r"objective 'loss' of module 'a' is nan"):
            check()


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(locc.LoccError, match=r"no module 'bb'; nearest: 'b'"):
        assert_isolated(program_of(Chain()), *batch(), owners=["bb"])


def test_a_target_is_made_up_where_none_is_given() -> None:
    program = program_of(Chain(), loss=lambda output, target: (output * target.get("weights")).sum())
    with pytest.raises(locc.LoccError, match=r"give the target y"):
        assert_isolated(program, batch()[0])
    assert_isolated(program, batch()[0], {"weights": torch.ones(6, CLASSES)})


def test_a_program_without_example_inputs_is_completed() -> None:
    program = program_of(Chain(), example_inputs=None)
    assert_isolated(program, *batch())
    assert program.ir.modules


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("method", ["dgl", "bp", "dtp"])
def test_leaves_the_program_as_it_was(method: str, mode: bool) -> None:
    program = program_of(Residual(), method, splits=["stem", "one", "two"], accumulate=2, verify=mode)
    for _ in range(3):  # an odd number: a mean gradient is half accumulated
        program.step(*batch())
    program.train(mode)
    program.model.two.eval()
    before = everything(program)
    assert any(p.grad is not None for p in program.parameters())
    x, y = batch()
    assert_isolated(program, x, y)
    assert everything(program) == before
    assert all(torch.equal(one, other) for one, other in zip((x, y), batch(), strict=True))
