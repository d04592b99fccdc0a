"""The kit's models and cases are what their descriptions say, again and again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import locc
from locc.ir import Inputs
from locc.testing import Case, ModelSpec, cases, models
from locc.testing.case import OPTIMIZERS
from locc.testing.families import FAMILIES
from support import same

KINDS = [(family, kind) for family, known in FAMILIES.items() for kind in known.blocks]


def flat(value: Any) -> list[torch.Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


@settings(max_examples=50)
@given(models(), st.integers(2, 5), st.integers(0, 9))
def test_a_description_rebuilds_the_model_and_its_data(spec: ModelSpec, size: int, number: int) -> None:
    again = eval(repr(spec))
    assert again == spec
    before = torch.get_rng_state()
    assert same(spec.build().state_dict(), again.build().state_dict())
    for one, other in zip(flat(spec.batch(size, number)), flat(again.batch(size, number)), strict=True):
        assert torch.equal(one, other)
        assert one.shape[0] == size
    assert torch.equal(before, torch.get_rng_state())
    first, second = flat(spec.batch(8, number)), flat(spec.batch(8, number + 1))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=4)
@given(cases())
def test_a_case_rebuilds_the_program(case: Case) -> None:
    again = eval(repr(case))
    assert again == case
    results = []
    for each in (case, again):
        program = each.compile(verify=False)
        program.step(*each.batch())
        results.append(program.root.state_dict())
    assert same(*results)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_block_of_every_family_is_clean(family: str, kind: str) -> None:
    spec = ModelSpec(family, (kind, kind))
    case = Case(spec, splits=spec.splits, batch_size=3)
    model, (x, y) = spec.build(), case.batch()
    inputs = Inputs.of(model, x)
    outputs = flat(model(*inputs.args, **inputs.kwargs))
    assert len(outputs) == 1 + FAMILIES[family].outputs
    assert {tuple(output.shape) for output in outputs} == {(*y.shape, FAMILIES[family].classes)}
    program = case.compile()
    assert program.certificate.complete
    assert len(program.ir.modules) == len(spec.splits) + 1


@pytest.mark.parametrize("family", [name for name, found in FAMILIES.items() if found.grows])
def test_a_family_that_grows_takes_longer_inputs(family: str) -> None:
    case = Case(ModelSpec(family, tuple(FAMILIES[family].blocks)[:1]), dynamic=True)
    program = case.compile(verify=False)
    assert all(spec.free for spec in program.ir.captured.signature.specs)
    program.step(*case.batch(more=3))


def test_what_is_frozen_and_shared() -> None:
    spec = ModelSpec(
        "chain", ("tanh", "spectral_norm", "tanh"), frozen=("stem.weight", "blocks.1"), shared=True
    )
    model = spec.build()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"stem.bias", "blocks.0.0.weight", "blocks.0.0.bias", "head.weight", "head.bias"}
    assert model.blocks[2][0].weight is model.blocks[0][0].weight
    assert spec.parts == 3  # blocks.0, blocks.2 and the head


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_case_trains_with_its_optimizer(name: str) -> None:
    program = Case(optimizer=name).compile()
    kinds = {"sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW"}
    assert {type(o).__name__ for o in program.optimizers.values()} == {kinds[name]}


def test_a_case_hands_its_settings_on_and_lets_them_be_overridden() -> None:
    case = Case(method="dfa", options={"zero_init": True}, schedule="lockstep", seed=3)
    program = case.compile(accumulate=2)
    assert program.built.executor.seed == 3
    assert program.settings.accumulate == 2
    plain = Case(method="dfa", seed=3).compile()
    assert not same(program.root.state_dict(), plain.root.state_dict())


def test_a_refusal_is_told_and_an_error_is_raised() -> None:
    assert Case().refusal() is None
    skips = ModelSpec("residual", ("tanh", "tanh"))
    refused = Case(skips, "altmin", splits=skips.splits).refusal()
    assert refused is not None
    assert "undefined on this model" in refused
    late = Case(schedule="sequential").refusal()
    assert late is not None
    assert "schedule='sequential'" in late
    with pytest.raises(locc.MethodError, match="has no option 'sigma'"):
        Case(options={"sigma": 1}).refusal()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSpec("chains"), "there is no family 'chains'; nearest: 'chain'"),
        (lambda: ModelSpec(blocks=("tan",)), "family 'chain' has no block 'tan'; nearest: .*'tanh'"),
        (lambda: ModelSpec("recurrent"), "family 'recurrent' has no block 'tanh'"),
        (lambda: ModelSpec(frozen=("body",)).build(), "the model has no parameter under 'body'"),
        (lambda: ModelSpec(loss="l1"), "loss='l1': give 'cross_entropy' or 'mse'"),
        (lambda: Case(optimizer="sdg"), "optimizer='sdg' is unknown; nearest: 'sgd'"),
    ],
)
def test_descriptions_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(locc.LoccError, match=message):
        make()
