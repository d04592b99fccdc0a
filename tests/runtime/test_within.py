"""update="in_backward": the same training, with one gradient in memory at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.meter import peak
from locc import LoccError, MethodError, testing
from locc.runtime.within import weight_first
from support import Residual, batch, compiled, mlp, same, sgd, snapshot, usual_case

X, Y = batch()


@pytest.mark.parametrize("method", ["bp", "dgl", "predsim", "dfa", "dni", "altmin"])
@pytest.mark.parametrize(
    "optimizer", [None, lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)], ids=["recipe", "sgd"]
)
def test_the_same_bits_are_trained(method, optimizer):
    case = usual_case(method)
    found = []
    for update in ("after_backward", "in_backward"):
        program = case.compile(optimizer=optimizer, update=update, seed=0)
        reports = [program.step(*case.batch(i)) for i in range(3)]
        held = [o.state_dict()["state"] for o in program.optimizers.values()]
        found.append((snapshot(program), held, [float(report.loss) for report in reports]))
        assert not any(p._post_accumulate_grad_hooks for p in program.parameters())
        assert all(p.grad is None for p in program.parameters())
    (one, states, losses), (other, others, again) = found
    assert same(one, other)
    torch.testing.assert_close(states, others, rtol=0, atol=0)
    assert losses == again


def test_strict_norms_leave_weights_alone_that_are_still_to_be_read():
    model = testing.ModelSpec("branching", ("constant", "twice"), frozen=("stem",))
    case = testing.Case(model, "ss-usf", {"normalize": True}, ("blocks.0",))
    found = []
    for update in ("after_backward", "in_backward"):
        program = case.compile(update=update, seed=0)
        for number in range(3):
            program.step(*case.batch(number))
        found.append(snapshot(program))
    assert same(*found)


def test_gradients_are_dropped_one_by_one():
    def most(update: str) -> int:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64) for _ in range(8)]
        program = compiled(nn.Sequential(*layers), "bp", update=update, example_inputs=torch.randn(2, 64))
        x, y = torch.randn(2, 64), torch.randint(64, (2,))
        program.step(x, y)
        return peak(lambda: program.step(x, y), program.parameters()).total

    matrix = 4 * 64 * 64
    assert most("after_backward") > 8 * matrix
    assert most("in_backward") < 3 * matrix


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (3, 5, 24), (2, 3, 5, 24), (24, 5), (24,)], ids=str)
def test_a_linear_layer_that_lets_go_of_its_input_has_the_same_bits(shape, bias):
    layer = nn.Linear(24, 16, bias=bias)
    x = torch.randn(shape)
    found = []
    for forward in (layer.forward, weight_first(layer, layer.forward)):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        out = forward(given.t() if shape == (24, 5) else given)
        name = type(out.grad_fn).__name__
        out.add_(1)  # as an activation in place does
        out[..., :7].sin().sum().backward(retain_graph=True)  # what another backward pass may need stays
        out.sum().backward()
        found.append([out, given.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert name == "_LinearBackward" or len(shape) == 1
    with torch.no_grad():
        assert forward(x.t() if shape == (24, 5) else x).grad_fn is None
    assert torch.func.vmap(forward)(torch.randn(2, 4, 24)).shape == (2, 4, 16)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["whole", "strided"])
def test_the_gradient_of_a_bias_is_summed_as_pytorch_sums_it(order):
    layer = nn.Linear(16, 16)
    back = tuple(order.index(i) for i in range(4))
    x, gradient = (torch.randn(4, 8, 8, 16).permute(order).contiguous().permute(back) for _ in range(2))
    layer_as_it_is, ours = (
        torch.autograd.grad(forward(x), [*layer.parameters()], gradient)
        for forward in (layer.forward, weight_first(layer, layer.forward))
    )
    assert all(torch.equal(a, b) for a, b in zip(layer_as_it_is, ours, strict=True))


def test_a_wide_value_goes_before_its_gradient_comes():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    program = compiled(wide, "bp", update="in_backward", example_inputs=torch.randn(2, 64))
    x, y = torch.randn(32, 64), torch.randint(64, (32,))
    program.step(x, y)
    value = 4 * 32 * 512  # two of them before and after the GELU, two in the gradient of a weight; not five
    assert peak(lambda: program.step(x, y), program.parameters()).total < 4.5 * value


def test_a_backward_pass_of_the_callers_own_updates_nothing():
    program = compiled(Residual(), "dgl", ["blocks.0"], update="in_backward")
    program.step(X, Y)
    before = snapshot(program)
    nn.functional.cross_entropy(program.model(X), Y).backward()
    assert same(before, snapshot(program))


class Rows(nn.Module):
    """Gives away its own parameter, a row for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        return self.table[: len(x)]


class Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.a, self.b = Rows(), nn.Linear(4, 4), nn.Bilinear(4, 4, 3)

    def forward(self, x):
        rows = self.rows(x)
        return self.b(self.a(x + rows), rows)


def test_later_modules_read_what_lies_in_a_parameter_as_it_was():
    programs = []
    for update in ("after_backward", "in_backward"):
        torch.manual_seed(0)
        programs.append(compiled(Gives(), "dgl", ["a"], update=update, seed=0, optimizer=sgd()))
        programs[-1].step(X, Y)
    assert same(*map(snapshot, programs))


class Lends(nn.Module):
    """Its second module reads a parameter of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) + self.a.bias)


@pytest.mark.parametrize(
    ("model", "method", "options", "error", "message"),
    [
        (mlp(), "dgl", {"clip": 1.0}, LoccError, "clip=1.0 needs the norm of all of a module's"),
        (mlp(), "dgl", {"accumulate": 2}, LoccError, "accumulate=2 keeps it for the next steps"),
        (mlp(), "dgl", {"update": "late"}, LoccError, "update='late' is not available"),
        (mlp(), "infopro", {}, MethodError, "'infopro' module '.*' has to wait: it has 2 objectives"),
        (Lends(), "dgl", {"tied": "owner"}, MethodError, "module 'a' has to wait: its parameters, as they"),
    ],
)
def test_what_it_cannot_be_is_refused(model, method, options, error, message):
    before, cut = snapshot(model), "a" if isinstance(model, Lends) else "relu1"
    with pytest.raises(error, match=message):
        compiled(model, method, [cut], **{"update": "in_backward"} | options)
    assert same(before, snapshot(model))
