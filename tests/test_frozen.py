"""Modules that the user has frozen run, pass on their value, and stay as they are."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import locc
from support import batch, compiled, gap, same, sgd, snapshot

SPLITS = ["a", "b", "c"]


def chain(*frozen: str) -> nn.Sequential:
    model = nn.Sequential()
    for name, width in zip("abc", (4, 8, 8), strict=True):
        model.add_module(name, nn.Sequential(nn.Linear(width, 8), nn.Tanh()))
    model.add_module("d", nn.Linear(8, 3))
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", ["a", "b", "d", "ab"])
def test_backpropagation_goes_through_what_is_frozen(frozen):
    assert gap(chain(*frozen), SPLITS, verify=False) < 1e-12


@pytest.mark.parametrize("frozen", ["a", "b"])
@pytest.mark.parametrize(
    "method", ["dgl", "predsim", "sim", "dtp", "tp", "dni", "cdni", "fa", "dfa", "al", "altmin"]
)
def test_a_frozen_module_stays_and_the_others_train(method, frozen):
    model = chain(frozen)
    before = snapshot(model)
    options = {"width": 8} if method.endswith("dni") else {}
    program = compiled(model, method, SPLITS, optimizer=sgd(0.5), verify=False, seed=0, **options)
    for _ in range(5):  # a synthesiser starts at zero, so what is below it moves late
        program.step(*batch())
    moved = {n.split(".")[0] for n, t in snapshot(model).items() if not torch.equal(before[n], t)}
    assert moved == set("abcd") - {frozen}
    assert frozen not in program.optimizers or method == "al"  # its bridge is no part of the model


def test_what_a_frozen_module_needs_for_nobody_is_left_out():
    program = compiled(chain("a", "b"), "bp", SPLITS, verify=False)
    assert set(program.step(*batch()).objectives) == {"c.chain", "d.loss"}
    heads = compiled(chain("b"), "dgl", SPLITS, verify=False).root.aux
    assert {name.split("_")[0] for name in heads} == {"a", "c"}


def test_the_certificate_lists_what_is_frozen():
    model = chain("b")
    before = snapshot(model)
    certificate = compiled(model, "dgl", SPLITS).certificate
    assert certificate.complete
    assert [o.name for o in certificate.owners if o.frozen] == ["b"]
    assert certificate.text(verbose=True).count("frozen    all its parameters have requires_grad=False") == 1
    assert str(certificate).count("parameters; frozen") == 1
    assert [o["frozen"] for o in json.loads(certificate.to_json())["owners"]] == [False, True, False, False]
    assert locc.facts.Certificate.from_json(certificate.to_json()) == certificate
    assert same(before, snapshot(model))


def test_a_model_that_is_frozen_whole_is_refused():
    with pytest.raises(locc.SplitError, match="or all of them have requires_grad=False"):
        compiled(chain("a", "b", "c", "d"), "bp", SPLITS)
