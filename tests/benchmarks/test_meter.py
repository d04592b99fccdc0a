"""The memory meter, against cases whose bytes can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.meter import Timing, allocated, interleave, peak, peak_memory, ratio

F4 = 4  # bytes in a float32
B, D = 32, 64
ACTIVATION = B * D * F4
WEIGHT = D * D * F4


def test_one_tensor() -> None:
    assert peak_memory(lambda: torch.zeros(1000)) == 4000


def test_views_and_in_place_ops_cost_nothing() -> None:
    def fn() -> None:
        a = torch.zeros(10, 100)
        b = a.t().reshape(1000, 1)[5:].unsqueeze(0).detach()  # reshape of a transpose copies: 4000 more
        b.add_(1).mul_(2)

    assert peak_memory(fn) == 8000


def test_freed_storage_is_reusable() -> None:
    def fn() -> None:
        for _ in range(10):
            a = torch.ones(1000)
            del a

    assert peak_memory(fn) == 4000


def test_overlap_is_counted() -> None:
    def fn() -> None:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b + 1
        del b, c
        torch.ones(100)

    assert peak_memory(fn) == 8000


def test_baseline_tensors_and_their_views_do_not_count() -> None:
    weight = torch.randn(1000, requires_grad=True)
    batch = torch.randn(10, 1000)

    def fn() -> None:
        weight.detach().view(10, 100).t()
        batch[3].unsqueeze(0)
        batch.mul_(2)

    assert peak_memory(fn) == 0


@pytest.mark.parametrize("make", [lambda: torch.tensor([1.0] * 500), lambda: torch.as_tensor([1.0] * 500)])
def test_tensors_made_from_python_values_count(make: object) -> None:
    assert peak_memory(make) == 2000  # type: ignore[arg-type]


def test_saved_tensors_live_as_long_as_the_tape() -> None:
    x = torch.randn(B, D)
    w = [torch.randn(D, D, requires_grad=True) for _ in range(4)]

    def forward() -> torch.Tensor:
        h = x
        for weight in w:
            h = h @ weight  # saves its input: all of x, h1, h2, h3 and the result live on
        return h

    assert peak_memory(forward) == 4 * ACTIVATION

    def no_tape() -> None:
        with torch.no_grad():
            forward()

    assert peak_memory(no_tape) == 2 * ACTIVATION


def test_backward_is_counted() -> None:
    # L = sum(x W), one matrix: the product, the scalar, ones (scalar), expanded (view), then dW.
    x = torch.randn(B, D)
    w = torch.randn(D, D, requires_grad=True)
    measured = peak(lambda: (x @ w).sum().backward(), [w])
    assert w.grad is not None
    assert measured.gradients == WEIGHT
    # x.W is freed when sum's backward has run, or with its frame: sum saves only sizes
    assert WEIGHT <= measured.total <= WEIGHT + ACTIVATION + 3 * F4


def test_gradients_of_a_chain_accumulate() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(6)))
    x = torch.randn(4, D)
    measured = peak(lambda: layers(x).sum().backward(), layers.parameters())
    assert measured.gradients == 6 * WEIGHT
    small = 4 * D * F4
    assert 6 * WEIGHT <= measured.total <= 6 * WEIGHT + 8 * small


def test_gradients_that_exist_are_baseline() -> None:
    layer = nn.Linear(D, D, bias=False)
    x = torch.randn(B, D)

    def fn() -> None:
        layer(x).sum().backward()

    fn()
    layer(x).sum().backward()
    measured = peak(fn, layer.parameters())
    assert measured.gradients == 0  # added in place into a baseline storage
    assert measured.total >= WEIGHT  # the new contribution is alive while it is added


def test_optimizer_state_that_exists_is_baseline() -> None:
    layer = nn.Linear(D, D, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(1, D)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = peak(step)
    second = peak(step)
    assert first.with_optimizer >= 2 * WEIGHT  # gradient and momentum buffer
    assert WEIGHT <= second.with_optimizer < 1.2 * WEIGHT


def test_optimizer_temporaries_are_counted_apart() -> None:
    layer = nn.Linear(D, D, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), foreach=False)
    x = torch.randn(1, D)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured = peak(step, layer.parameters())
    assert measured.gradients == WEIGHT
    assert measured.total < 1.2 * WEIGHT
    assert 3 * WEIGHT <= measured.with_optimizer < 3.2 * WEIGHT  # the square root, and the denominator


def test_the_allocator_hands_out_what_the_dispatcher_shows() -> None:
    block = nn.Sequential(nn.Linear(D, D), nn.ReLU())
    x = torch.randn(B, D)

    def step() -> None:
        block(x).sum().backward()
        block.zero_grad()

    assert allocated(step) == pytest.approx(peak(step).total, rel=0.01)


def test_convolution_with_batch_norm() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(16, 3, 8, 8)
    image = 16 * 8 * 8 * 8 * F4
    measured = peak(lambda: net(x), net.parameters())
    statistics = 2 * 8 * F4  # saved mean and inverse deviation
    assert 3 * image <= measured.total <= 3 * image + 2 * statistics + 8


def test_meter_leaves_no_hook_and_propagates_errors() -> None:
    layer = nn.Linear(2, 2)

    def fails() -> None:
        layer(torch.randn(3, 2)).sum().backward()
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        peak(fails, layer.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in layer.parameters())


def test_storage_that_outlives_the_meter() -> None:
    kept: list[torch.Tensor] = []
    assert peak_memory(lambda: kept.append(torch.zeros(1000))) == 4000
    kept.clear()
    assert peak_memory(lambda: kept.append(torch.zeros(500))) == 2000


@pytest.mark.gpu
def test_cuda() -> None:
    assert peak_memory(lambda: torch.zeros(1 << 20, device="cuda"), "cuda") >= 4 << 20


def test_timing_is_interleaved() -> None:
    calls: list[str] = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert [len(v) for v in times.values()] == [3, 3]
    assert len(interleave({"a": lambda: None}, rounds=9, until=0)["a"]) == 3  # that is past
    assert ratio({"a": [2.0, 4.0, 9.0], "b": [1.0, 1.0, 3.0]}, "a", "b") == Timing(3.0, 2.0, 4.0)
