"""`ifa`: the rule in NumPy, its limit, and how a delta goes up through what is no layer.

Nøkland 2016, equation 9; his released code has no such mode.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import locc
from locc.errors import MethodError
from support import close, sgd

D = torch.float64


def matrix(program, name):
    return program.root.get_submodule(f"aux.feedback_{name}").matrix


def test_against_the_rule_by_hand():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)
    ).to(D)
    x = torch.randn(9, 6, dtype=D)
    program = locc.compile(model, "ifa", ["1", "3", "5"], example_inputs=x, optimizer=sgd(0.3))
    assert list(program.root.aux) == ["feedback_1"]
    b = matrix(program, 1).numpy().copy()
    held = [p.detach().numpy().copy() for p in model.parameters()]
    for _ in range(3):
        y = torch.randint(4, (9,))
        program.step(x, y)
        w1, b1, w2, b2, w3, b3, w4, b4 = held
        h1 = np.tanh(x.numpy() @ w1.T + b1)
        h2 = 1 / (1 + np.exp(-(h1 @ w2.T + b2)))
        h3 = np.tanh(h2 @ w3.T + b3)
        a4 = h3 @ w4.T + b4
        e = (np.exp(a4) / np.exp(a4).sum(1, keepdims=True) - np.eye(4)[y]) / 9
        d1 = (e @ b.T) * (1 - h1**2)
        d2 = (d1 @ w2.T) * h2 * (1 - h2)
        d3 = (d2 @ w3.T) * (1 - h3**2)
        steps = []
        for d, h in ((d1, x.numpy()), (d2, h1), (d3, h2), (e, h3)):
            steps += [d.T @ h, d.sum(0)]
        held = [p - 0.3 * step for p, step in zip(held, steps, strict=True)]
        for found, wanted in zip(model.parameters(), held, strict=True):
            np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=0, atol=1e-10)


def test_with_one_hidden_layer_it_is_dfa():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(D)
    twin = copy.deepcopy(model)
    x, y = torch.randn(5, 6, dtype=D), torch.randint(4, (5,))
    one, two = (
        locc.compile(m, name, ["1"], example_inputs=x, optimizer=sgd())
        for m, name in ((model, "ifa"), (twin, "dfa"))
    )
    matrix(one, 1).copy_(matrix(two, 1))
    for _ in range(3):
        one.step(x, y)
        two.step(x, y)
    close(model, twin, 1e-14)


class Blocks(nn.Module):
    """A skip over two modules, BatchNorm and dropout where a delta goes up; perhaps in place."""

    def __init__(self, inplace):
        super().__init__()
        self.silu = nn.SiLU(inplace)
        self.a, self.b, self.c, self.out = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.5)

    def forward(self, x):
        h = locc.split(torch.tanh(self.a(x)), "first")
        k = locc.split(self.silu(self.norm(self.b(self.drop(h)))), "second")
        return self.out(locc.split(torch.tanh(self.c(self.silu(k + h))), "third"))


def silu_slope(a):
    s = a.sigmoid()
    return s * (1 + a * (1 - s))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_delta_goes_up_through_skips_norms_and_the_dropout_of_this_step(inplace, monkeypatch):
    """The delta that `second` sends is J delta, J by autograd from the module's own forward."""
    mask = torch.tensor([[0.0, 2, 2, 0, 2]] * 9, dtype=D)
    drop = nn.Dropout.forward
    monkeypatch.setattr(nn.Dropout, "forward", lambda s, h: h * mask if h.shape == mask.shape else drop(s, h))
    model = Blocks(inplace).to(D)
    twin = copy.deepcopy(model)
    x, y = torch.randn(9, 6, dtype=D), torch.randint(4, (9,))
    program = locc.compile(model, "ifa", example_inputs=x, optimizer=sgd(1.0))
    program.step(x, y)
    with torch.no_grad():
        h = torch.tanh(twin.a(x))
        before = nn.functional.batch_norm(
            twin.b(h * mask), None, None, twin.norm.weight, twin.norm.bias, training=True
        )
        k = nn.functional.silu(before)
        third = torch.tanh(twin.c(nn.functional.silu(k + h)))
        e = (twin.out(third).softmax(1) - nn.functional.one_hot(y, 4)) / 9
        first = (e @ matrix(program, "first").T) * (1 - h**2)

    def lower(v):
        return nn.functional.batch_norm(
            twin.b(v * mask), None, None, twin.norm.weight, twin.norm.bias, training=True
        )

    rows = torch.autograd.functional.jacobian(lower, h).detach()
    second = torch.einsum("ijkl,kl->ij", rows, first) * silu_slope(before)
    third_delta = (((second + first) * silu_slope(k + h)) @ twin.c.weight.T) * (1 - third**2)
    wanted = {"a": first.T @ x, "c": third_delta.T @ nn.functional.silu(k + h)}
    for name, slope in wanted.items():
        moved = (twin.get_submodule(name).weight - model.get_submodule(name).weight).detach()
        assert float(moved.abs().max()) > 1e-3
        torch.testing.assert_close(moved, slope.detach(), atol=1e-10, rtol=0)


def attended(h):
    """Fused attention, and sizes that the forward reads."""
    heads = h.view(h.size(0), 3, 2, 2).transpose(1, 2)
    mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
    return mixed.transpose(1, 2).reshape(h.shape[0], 3, 4)


def normed(h):
    image = h.view(h.size(0), 3, 2, 2).to(memory_format=torch.channels_last)
    return nn.functional.group_norm(image, 3).reshape(h.shape[0], 3, 4)


def expanded(h):
    return torch.split(h, 1, -1)[0].expand(-1, -1, 4).sin()


def strided(h):
    return h.mul(2).transpose(1, 2).as_strided((h.size(0), 3, 4), (12, 4, 1))


class Between(nn.Module):
    """Something between the layers, where a delta goes up."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(12, 5)

    def forward(self, x):
        h = locc.split(torch.tanh(self.a(x)), "first")
        return self.out(locc.split(torch.tanh(self.b(self.between(h))), "second").flatten(1))


@pytest.mark.parametrize("between", [attended, normed, expanded, strided])
def test_a_delta_goes_up_through_what_lies_between_layers(between):
    model = Between(between).to(D)
    twin = copy.deepcopy(model)
    x, y = torch.randn(9, 3, 6, dtype=D), torch.randint(5, (9,))
    program = locc.compile(model, "ifa", example_inputs=x, optimizer=sgd(1.0))
    program.step(x, y)
    with torch.no_grad():
        h = torch.tanh(twin.a(x))
        mixed = between(h)
        k = torch.tanh(twin.b(mixed))
        e = (twin.out(k.flatten(1)).softmax(1) - nn.functional.one_hot(y, 5)) / 9
        first = (e @ matrix(program, "first").T / 3).unsqueeze(1) * (1 - h**2)
    rows = torch.autograd.functional.jacobian(lambda v: twin.b(between(v)), h)
    second = torch.einsum("abcijk,ijk->abc", rows, first) * (1 - k**2)
    moved = (twin.b.weight - model.b.weight).detach()
    assert float(moved.abs().max()) > 1e-3
    torch.testing.assert_close(moved, torch.einsum("bti,btj->ij", second, mixed), atol=1e-10, rtol=0)


def test_what_has_no_derivative_in_forward_mode_is_refused():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.RReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(
        MethodError, match=r"'2' \(RReLU\) of module '4' draws random numbers.*use another method"
    ):
        locc.compile(model, "ifa", ["1", "4"], example_inputs=torch.randn(4, 6))
