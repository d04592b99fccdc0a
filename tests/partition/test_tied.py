from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import locc
from locc import SplitError
from support import Tied, close, compiled, gap, same, sgd, snapshot

TOKENS = torch.randint(11, (6, 4), generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(11, (6, 4), generator=torch.Generator().manual_seed(2))


def build(tied: str, model: nn.Module | None = None, **options):
    model = Tied().double() if model is None else model
    program = locc.compile(model, "bp", ["mid"], example_inputs=TOKENS, optimizer=sgd(), tied=tied, **options)
    return model, program


def eager_step(model: nn.Module) -> None:
    model.zero_grad()
    functional.cross_entropy(model(TOKENS).flatten(0, 1), TARGET.flatten()).backward()
    sgd()(model.parameters()).step()


@pytest.mark.parametrize(("method", "one"), [("bp", True), ("dgl", False)])
def test_by_default_bp_keeps_a_tied_parameter_and_local_methods_train_copies(method, one, caplog):
    model = Tied()
    program = locc.compile(model, method, ["mid"], example_inputs=TOKENS)
    assert (model.head.weight is model.embed.weight) == one
    text = (
        "'head' trains a copy of parameter 'head.weight', which it shared with 'mid'; tied='owner' would "
        "keep it one, which the first trains"
    )
    told = [record.getMessage() for record in caplog.records if record.name == "locc"]
    assert told == ([] if one else [f"locc: Tied: {text}"])
    assert (text in " ".join(program.certificate.text().split())) != one
    assert one or program.certificate.verdict.startswith("strictly")


def test_a_refusal_names_both_places():
    model = Tied()
    before = snapshot(model)
    with pytest.raises(
        SplitError, match=r"'embed.weight' in module 'mid', 'head.weight' in module 'head'; pass tied="
    ) as e:
        locc.compile(model, "bp", ["mid"], example_inputs=TOKENS, tied="error")
    assert "'owner'" in str(e.value)
    assert same(before, snapshot(model))
    assert model.head.weight is model.embed.weight


def test_both_uses_in_one_module_need_no_policy():
    locc.compile(Tied(), "bp", [], example_inputs=TOKENS)


def test_a_frozen_tied_parameter_needs_no_policy():
    class Deeper(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(5, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.more(torch.tanh(self.mid(self.embed(tokens))))))

    model = Deeper()
    model.embed.weight.requires_grad_(False)
    before = model.embed.weight.clone()
    locc.compile(model, "bp", ["mid"], example_inputs=TOKENS, optimizer=sgd()).step(TOKENS, TARGET)
    assert torch.equal(model.head.weight, before)


def test_the_owner_trains_with_the_gradient_of_both_uses():
    """For bp the tied parameter gets the sum of both gradients, as in eager training."""
    model, program = build("owner")
    eager = copy.deepcopy(model)
    for _ in range(2):
        program.step(TOKENS, TARGET)
        eager_step(eager)
    assert model.head.weight is model.embed.weight
    close(model, eager, 1e-12)
    assert (
        sum(model.embed.weight is p for o in program.ir.owners for p in program.ir.parameters(o).values())
        == 1
    )
    (coupling,) = program.ir.couplings
    assert str(coupling) == "'head' uses parameter 'head.weight', which 'mid' owns and trains"
    assert coupling.owners == ("mid", "head")


def test_the_owner_updates_after_every_reader():
    _, program = build("owner")
    text = str(program.plan()).splitlines()
    assert max(i for i, t in enumerate(text) if t.startswith("head: ")) < text.index("mid: update")


def test_copies_train_apart_and_start_equal():
    model, program = build("copy")
    assert model.head.weight is not model.embed.weight
    assert torch.equal(model.head.weight, model.embed.weight)
    eager = Tied().double()
    eager.head.weight = nn.Parameter(torch.empty(11, 5, dtype=torch.float64))
    eager.load_state_dict(model.state_dict())
    program.step(TOKENS, TARGET)
    eager_step(eager)
    close(model, eager, 1e-12)
    assert not torch.equal(model.head.weight, model.embed.weight)


def test_copying_is_undone_when_compilation_fails_later():
    model = Tied()
    weight = model.embed.weight
    with pytest.raises(locc.MethodError):
        build("copy", model, scheduler=lambda o: 1 / 0)
    assert model.head.weight is model.embed.weight is weight


def test_a_submodule_called_in_two_modules_cannot_be_copied():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.mid, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.shared(torch.tanh(self.mid(self.shared(x)))))

    model = Twice()
    weight = model.shared.weight
    with pytest.raises(
        SplitError, match=r"'shared.weight' cannot be copied for module .*, as tied='auto' .*use tied='owner'"
    ):
        compiled(model, "dgl", ["mid"])
    assert model.shared.weight is weight
    assert gap(model, ["mid"], tied="owner") < 1e-12


def test_uses_in_one_later_module_share_one_copy():
    class Three(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(5, 11, bias=False)
            self.second.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.tanh(self.mid(self.embed(tokens)))
            return self.head(h) + self.second(h * h)

    model, program = build("copy", Three())
    assert model.second.weight is model.head.weight is not model.embed.weight
    assert len(program.ir.parameters("output")) == 1


def test_an_unknown_policy():
    with pytest.raises(SplitError, match="tied='share': choose 'auto', 'owner', 'copy' or 'error'"):
        build("share")
