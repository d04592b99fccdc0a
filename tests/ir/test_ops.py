from __future__ import annotations

import torch
from torch import nn

from locc.ir import assign, gradient, inner, objective, stop_gradient
from locc.ir.ops import call_quietly, call_with


def test_stop_gradient_cuts_the_tape():
    x = torch.randn(3, requires_grad=True)
    assert not stop_gradient(x * 2).requires_grad


def test_gradient_is_a_value_without_tape():
    x = torch.randn(3, requires_grad=True)
    found = gradient((x**2).sum(), x)
    assert torch.equal(found, 2 * x)
    assert not found.requires_grad


def test_gradient_of_something_unrelated_is_zero():
    x, z = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    assert torch.equal(gradient((x**2).sum(), z), torch.zeros(2))
    assert torch.equal(gradient(torch.ones(()), z), torch.zeros(2))


def test_inner_hands_down_exactly_the_gradient():
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 3, dtype=torch.float64)
    objective(inner(h, g)).backward()
    assert torch.equal(h.grad, g)


def test_assign_writes_without_a_tape():
    weight = nn.Parameter(torch.zeros(3))
    assign(weight, torch.arange(3.0))
    assert torch.equal(weight, torch.arange(3.0))
    assert weight.grad_fn is None


def test_call_with_replaces_only_what_is_named():
    layer = nn.Linear(2, 2)
    other = torch.zeros(2, 2)
    x = torch.randn(3, 2)
    assert torch.equal(call_with(layer, {"weight": other}, (x,), {}), layer.bias.expand(3, 2))


def test_call_quietly_keeps_batchnorm_statistics():
    layer = nn.BatchNorm1d(2)
    before = layer.running_mean.clone()
    call_quietly(layer, (torch.randn(8, 2) + 5,), {})
    assert torch.equal(layer.running_mean, before)
    assert layer.num_batches_tracked == 0
