"""Networks and tensors that a user gives for the parts of a method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locc
from locc.errors import MethodError
from locc.ir import TensorSpec
from support import batch, compiled, mlp, sgd

SPLITS = ["relu1", "relu2"]


def linear(source: TensorSpec, result: TensorSpec) -> nn.Module:
    return nn.Linear(int(source.features[0]), int(result.features[0]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            nn.Linear(8, 3),
            r"head of module 'relu1': a network was given, .* a dict by module, {'relu1': network}",
        ),
        (
            {"relu1": linear, "relu_2": linear},
            "head of module 'relu2': the dict has none for it; nearest: 'relu_2'",
        ),
        (
            lambda source: nn.Linear(8, 3),
            r"takes \(source\), and it is called with \(source spec, result spec\)",
        ),
        (lambda: nn.Linear(8, 3), r"the factory takes \(\)"),
        (nn.Linear, "the factory raised TypeError"),
        (3, "found int; give a factory"),
        (
            dict.fromkeys(SPLITS, nn.Linear(8, 3)),
            "one network is given for two places, .* 'relu2_head_relu2'",
        ),
        (lambda source, result: nn.Linear(8, 4), r"gives shape \(2, 4\)"),
    ],
)
def test_a_wrong_factory_is_refused_in_a_sentence(given: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        compiled(mlp(), locc.method("dgl", head=given), SPLITS, verify=False)


def test_a_factory_may_ask_for_the_modules_name_and_a_dict_holds_networks() -> None:
    asked = []

    def named(source: TensorSpec, result: TensorSpec, module: str) -> nn.Module:
        asked.append(module)
        return linear(source, result)

    compiled(mlp(), locc.method("dgl", head=named), SPLITS, verify=False)
    assert asked == SPLITS
    own = nn.Linear(8, 3)
    program = compiled(mlp(), locc.method("dgl", head={"relu1": own, "relu2": linear}), SPLITS, verify=False)
    assert program.auxiliaries["relu1"] == {"head": own}
    before = own.weight.clone()
    program.step(*batch())
    assert not torch.equal(own.weight, before)


ROLES = {
    "dgl": {"relu1": {"head"}, "relu2": {"head"}},
    "predsim": {"relu1": {"head", "sim_head"}, "relu2": {"head", "sim_head"}},
    "dtp": {"relu2": {"inverse"}},
    "dni": {"relu1": {"synthesiser"}, "relu2": {"synthesiser"}},
    "al": {"third": {"encoder"}},  # the middle module is the bridge
    "dfa": {"relu1": {"feedback"}, "relu2": {"feedback"}},
    "bp": {},
}


@pytest.mark.parametrize("method", ROLES)
def test_auxiliary_networks_are_found_by_module_and_role(method: str) -> None:
    program = compiled(mlp(), method, SPLITS, verify=False)
    assert {m: set(found) for m, found in program.auxiliaries.items()} == ROLES[method]
    held = [network for found in program.auxiliaries.values() for network in found.values()]
    assert {id(n) for n in held} == {id(n) for n in program.root.aux.values()}


def test_direct_feedback_goes_through_the_users_own_matrices() -> None:
    own = {name: torch.randn(8, 3) for name in SPLITS}
    program = compiled(mlp(), locc.method("dfa", feedback=own), SPLITS, optimizer=sgd(), verify=False)
    x, y = batch()
    model = program.model
    h = model[:2](x) if isinstance(model, nn.Sequential) else F.relu(model.first(x))
    error = (F.softmax(model(x), 1) - F.one_hot(y, 3)) / len(y)
    weight = next(p for n, p in model.named_parameters() if n.endswith("weight"))
    (gradient,) = torch.autograd.grad(h, weight, (error @ own["relu1"].t()).detach())
    wanted = weight - 0.1 * gradient
    program.step(x, y)
    torch.testing.assert_close(weight, wanted)
    with pytest.raises(
        MethodError, match=r"feedback of module 'relu1': give a tensor of shape \(8, 3\); found"
    ):
        compiled(mlp(), locc.method("dfa", feedback=lambda s, o: torch.randn(3, 8)), SPLITS, verify=False)


def test_laws_of_direct_feedback() -> None:
    torch.manual_seed(0)
    program = compiled(mlp(), locc.method("dfa", init="xavier_uniform"), SPLITS, verify=False)
    matrix = program.auxiliaries["relu1"]["feedback"].matrix
    assert isinstance(matrix, Tensor)
    bound = (6 / 11) ** 0.5
    assert bound / 2 < float(matrix.abs().max()) <= bound
    with pytest.raises(MethodError, match="init='xavier'; nearest: 'xavier_"):
        locc.method("dfa", init="xavier")


def test_altmin_has_a_rate_of_its_own_for_the_output_layer() -> None:
    rates = {}
    for factor in (1.0, 0.25):
        torch.manual_seed(0)
        program = compiled(
            mlp(),
            locc.method("altmin", output_lr=factor),
            ["first", "second"],
            optimizer=sgd(0.1),
            verify=False,
        )
        before = {n: p.clone() for n, p in program.model.named_parameters()}
        program.step(*batch())
        rates[factor] = {n: p.detach() - before[n] for n, p in program.model.named_parameters()}
    for name, moved in rates[1.0].items():
        factor = 0.25 if name.startswith("third") else 1.0
        torch.testing.assert_close(rates[0.25][name], factor * moved)


def test_predsim_may_start_its_output_layer_at_zero() -> None:
    program = compiled(mlp(), locc.method("predsim", zero_output=True), SPLITS, verify=False)
    assert not program.model.third.weight.any()
    assert program.model.second.weight.any()
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Tanh())
    with pytest.raises(
        MethodError, match="zero_output needs a linear or convolution layer that gives the output"
    ):
        locc.compile(
            model, "predsim", ["0"], example_inputs=torch.randn(4, 4), zero_output=True, verify=False
        )
