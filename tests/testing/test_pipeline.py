"""`assert_pipeline_exact`: the simulated pipeline agrees with lock-step training where it is claimed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.testing import pipeline
from locc.testing.pipeline import assert_pipeline_exact
from support import Tied

from .planted import (
    CLASSES,
    WIDTH,
    Chain,
    Langevin,
    Leaf,
    NoisyLeaf,
    batch,
    everything,
    program_of,
)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 3, "clip": 0.5},
        {"autocast": "bfloat16"},
        {"optimizer": lambda ps: Langevin(ps, lr=0.1)},
        {"schedule": "sequential"},
    ],
    ids=["accumulate and clip", "autocast", "noise", "sequential"],
)
def test_under_every_setting(options: dict[str, Any]) -> None:
    model = Chain()
    model.b = NoisyLeaf()
    program = program_of(model, **options)
    program.step(*batch())
    for phase in program.phases or [None]:
        program.phase = None if phase is None else phase.name
        assert_pipeline_exact(program, [batch(seed=i) for i in range(5)])


def test_batches_of_other_sizes_and_repeated_batches_are_fine() -> None:
    program = program_of(Chain())
    assert_pipeline_exact(program, [batch(size) for size in (6, 3, 5, 6, 6)])
    assert_pipeline_exact(program, [batch(), batch()])


def test_a_single_batch_shows_nothing() -> None:
    with pytest.raises(locc.LoccError, match=r"found 1 batch\(es\), give at least two"):
        assert_pipeline_exact(program_of(Chain()), [batch()])


def test_batches_that_are_made_up_differ() -> None:
    program = program_of(Chain())
    values = pipeline._made_up(program, 6)
    inputs = [v[0] for v in values]
    assert not any(torch.equal(one, other) for i, one in enumerate(inputs) for other in inputs[:i])
    assert all(v[0].shape == (2, WIDTH) for v in values)
    assert all(int(v[-1].min()) >= 0 and int(v[-1].max()) < CLASSES for v in values)


def test_token_ids_that_are_made_up_stay_token_ids() -> None:
    tokens = torch.tensor([[0, 3, 6, 1], [5, 0, 2, 2]])
    program = program_of(Tied(), splits=["embed", "mid"], example_inputs=tokens, tied="copy")
    first, second, *_ = (v[0] for v in pipeline._made_up(program, 4))
    assert torch.equal(first, tokens)
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten().sort().values, second.flatten().sort().values)
    assert_pipeline_exact(program)


# ---- claims that are wrong --------------------------------------------------------------------


PLANTS: dict[str, Callable[[], Chain]] = {
    "a detached stash": lambda: Chain(lambda other: other.last.mean(0)),
    "a counter": lambda: Chain(lambda other: 0.1 * other.calls),
    "a buffer that changes": lambda: Chain(lambda other: other.mean),
    "a detached weight": lambda: Chain(lambda other: other.linear.weight.detach()[0]),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_claim_that_is_wrong_is_refuted(plant: str) -> None:
    """What `b` reads of `a` beside the boundary is that of a later batch in a pipeline."""
    program = program_of(PLANTS[plant]())
    assert program.certificate.pipeline_exact
    program.step(*batch())
    before = everything(program)
    with pytest.raises(AssertionError, match=r"claims that .* is pipeline-exact, which is wrong: .*'b"):
        assert_pipeline_exact(program)
    assert everything(program) == before


def claim(program: locc.Program, **facts: Any) -> None:
    program.built.certificate = replace(program.certificate, pipeline_exact=True, **facts)


@pytest.mark.parametrize("method", ["bp", "dfa", "dtp"])
def test_a_false_claim_for_a_method_that_sends_down_is_refuted(method: str) -> None:
    program = program_of(Chain(), method)
    claim(program)
    with pytest.raises(AssertionError, match=r"by its own flows, values go round between 'a', 'b',.* 'head'"):
        assert_pipeline_exact(program)
    upward = tuple(f for f in program.certificate.flows if f.direction != "down")
    claim(program, flows=upward)
    with pytest.raises(AssertionError, match=r"batch 1, where 'a' needs '\w+' of '[\w.]+' before it"):
        assert_pipeline_exact(program)


def test_coupled_modules_are_not_pipeline_exact() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
            self.norm = nn.BatchNorm1d(WIDTH, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(torch.tanh(self.one(self.norm(x)))))

    program = program_of(Shared(), splits=["one"])
    with pytest.raises(
        AssertionError, match=r"is not pipeline-exact: BatchNorm statistics 'norm\.running_mean'"
    ):
        assert_pipeline_exact(program)
    claim(program, couplings=())
    with pytest.raises(AssertionError, match=r"which is wrong: buffer 'norm\.running_mean'"):
        assert_pipeline_exact(program)


def test_an_auxiliary_that_feeds_its_module_back_shares_its_stage() -> None:
    program = program_of(Chain(), "dni", width=8)
    flows = tuple(f for f in program.certificate.flows if f.direction != "down")
    stages = pipeline._stages(replace(program.certificate, flows=flows))
    assert frozenset({"a", "a.synthesiser"}) in stages
    assert [sorted(s)[0] for s in stages] == ["a", "b", "c", "head"]


def test_a_program_that_was_not_verified_is_proved_first() -> None:
    program = program_of(Chain(), verify=False)
    assert_pipeline_exact(program)
    assert program.built.certificate is None
    leaky = program_of(Chain(lambda other: other.linear.weight[0]), verify=False)
    with pytest.raises(AssertionError, match=r"is not local:(.|\n)*a\.linear\.weight"):
        assert_pipeline_exact(leaky)
    assert leaky.built.certificate is None


@pytest.mark.parametrize("given", [True, False])
def test_leaves_the_program_as_it_was(given: bool) -> None:
    program = program_of(Chain(lambda own: own.mean, of="none"), accumulate=2)
    for _ in range(3):
        program.step(*batch())
    program.eval()
    before = everything(program)
    assert_pipeline_exact(program, [batch(seed=i) for i in range(4)] if given else None)
    assert everything(program) == before


def test_a_failing_model_leaves_the_program_as_it_was() -> None:
    class Tired(Leaf):
        limit = 10**9

        def forward(self, x: Tensor) -> Tensor:
            if self.calls >= self.limit:
                raise ValueError("too many calls")
            return super().forward(x)

    model = Chain()
    model.c = Tired()
    program = program_of(model)
    model.c.limit = model.c.calls + 2
    before = everything(program)
    with pytest.raises(locc.RunError, match="too many calls"):  # lock-step training fails as well
        assert_pipeline_exact(program)
    assert everything(program) == before
