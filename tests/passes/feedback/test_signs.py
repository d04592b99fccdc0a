"""`ss-usf`, `ss-brsf`, `ss-frsf`: the rule in NumPy, its limit, its scales.

The authors' formulation (willwx/sign-symmetry, 3ed3812): modules/af_linear_module.py, lines 20 to 45, and
modules/af_conv2d_module.py, lines 29 to 70. Ours departs for grouped convolutions, which theirs lacks: a unit
gets errors from the outputs of its own group, so these alone count in the scale.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import locc
from locc_passes.feedback import signs
from support import close, sgd
from zoo import find

D = torch.float64
METHODS = ("ss-usf", "ss-brsf", "ss-frsf")


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).to(D)


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(54, 5),
    ).to(D)


@pytest.mark.parametrize("method", METHODS)
def test_against_the_rule_by_hand(method, monkeypatch):
    """Four steps at a rate at which weights change their signs."""
    scales = {(7, 8): 8**-0.5, (4, 7): 7**-0.5}
    size = {s: np.full(s, c) for s, c in scales.items()}
    if method == "ss-brsf":
        drawn = {s: np.random.default_rng(2).uniform(0, c, s) for s, c in scales.items()}
        monkeypatch.setattr(signs, "sizes", lambda x, shape, *_: torch.tensor(drawn[shape]).to(x.dtype))
        size = drawn
    model = mlp()
    x = torch.randn(5, 6, dtype=D)
    program = locc.compile(model, method, ["1", "3"], example_inputs=x, optimizer=sgd(1.0))
    buffers = dict(program.root.aux.named_buffers())
    assert list(buffers) == (["feedback_2.matrix", "feedback_4.matrix"] if method == "ss-frsf" else [])
    for name, buffer in buffers.items():
        shape = tuple(buffer.shape)
        assert 0 <= float(buffer.min()) < float(buffer.max()) <= scales[shape], name
        size[shape] = buffer.numpy().copy()
    w1, b1, w2, b2, w3, b3 = (p.detach().numpy().copy() for p in model.parameters())
    first = np.sign(w2)
    for _ in range(4):
        y = torch.randint(4, (5,))
        program.step(x, y)
        x_ = x.numpy()
        h1 = np.tanh(x_ @ w1.T + b1)
        h2 = np.tanh(h1 @ w2.T + b2)
        a3 = h2 @ w3.T + b3
        p = np.exp(a3) / np.exp(a3).sum(1, keepdims=True)
        d3 = (p - np.eye(4)[y]) / 5
        d2 = d3 @ (size[4, 7] * np.sign(w3)) * (1 - h2**2)
        d1 = d2 @ (size[7, 8] * np.sign(w2)) * (1 - h1**2)
        w1, b1 = w1 - d1.T @ x_, b1 - d1.sum(0)
        w2, b2 = w2 - d2.T @ h1, b2 - d2.sum(0)
        w3, b3 = w3 - d3.T @ h2, b3 - d3.sum(0)
        for found, wanted in zip(model.parameters(), (w1, b1, w2, b2, w3, b3), strict=True):
            np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=0, atol=1e-10)
    assert (np.sign(w2) != first).any()


def test_with_the_weights_own_sizes_it_is_backpropagation():
    model, x, y = convnet(), torch.randn(5, 2, 8, 8, dtype=D), torch.randint(5, (5,))
    twin = copy.deepcopy(model)
    program = locc.compile(model, "ss-frsf", ["2", "4"], example_inputs=x, optimizer=sgd())
    for number in (3, 6):
        program.root.aux[f"feedback_{number}"].matrix.copy_(model[number].weight.abs())
    program.step(x, y)
    locc.compile(twin, "bp", ["2", "4"], example_inputs=x, optimizer=sgd()).step(x, y)
    close(model, twin, 1e-12)


def test_the_scales():
    program = locc.compile(convnet(), "ss-usf", ["2", "4"], example_inputs=torch.randn(5, 2, 8, 8, dtype=D))
    found = [n.args[2] for n in program.ir.graph.nodes if n.target is signs.signed_layer]
    assert found == pytest.approx([(2 / (9 * 3)) ** 0.5, 54**-0.5])
    x = torch.zeros(1)
    uniform, normal = signs.sizes(x, (200, 200), 0.5, False), signs.sizes(x, (200, 200), 0.5, True)
    assert not torch.equal(uniform, signs.sizes(x, (200, 200), 0.5, False))
    assert float(uniform.min()) >= 0
    assert float(normal.min()) >= 0
    assert float(uniform.mean()) == pytest.approx(0.25, abs=0.005)
    assert float(normal.square().mean().sqrt()) == pytest.approx(0.5, abs=0.01)


def test_calls_of_one_weight_share_what_is_drawn():
    program = locc.compile(find("shared_block").build(), "ss-brsf", [], example_inputs=torch.randn(5, 6))
    drawn = [n for n in program.ir.graph.nodes if n.target is signs.sizes]
    assert sorted(len(n.users) for n in drawn) == [1, 3]


def test_parametrized_weights_show_their_own_signs():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    x, y = torch.randn(5, 6, dtype=D), torch.randint(4, (5,))
    twin = copy.deepcopy(model)
    program = locc.compile(model, "ss-frsf", ["1"], example_inputs=x, optimizer=sgd())
    for number in (2, 4):
        program.root.aux[f"feedback_{number}"].matrix.copy_(model[number].weight.detach().abs())
    program.step(x, y)
    nn.functional.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach() - 0.1 * q.grad, atol=1e-12, rtol=0)


def test_strict_normalisation_keeps_the_norm_of_each_weight():
    """Against a twin without it, step by step: the same update, then the initial norm."""
    model, x, y = mlp(), torch.randn(5, 6, dtype=D), torch.randint(4, (5,))
    twin = copy.deepcopy(model)
    program = locc.compile(model, "ss-usf", ["1"], example_inputs=x, optimizer=sgd(1.0), normalize=True)
    plain = locc.compile(twin, "ss-usf", ["1"], example_inputs=x, optimizer=sgd(1.0))
    norms = {name: p.norm() for name, p in model.named_parameters() if p.dim() > 1}
    assert "weights keep their norms" in str(program.ir)
    for _ in range(3):
        program.step(x, y)
        plain.step(x, y)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name in norms:
                    p.mul_(norms[name] / p.norm())
        close(model, twin, 1e-12)
