"""`ir.gradient` of any value of an owner, against autograd by hand."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc import Program
from locc.errors import GraphError
from locc.ir import Repeat, TrainingGraph, call_with, carry
from locc.testing import assert_lowered
from rules import Rule, finish, mean_square, repeat
from support import batch, compiled, mlp, sgd

LAST = "output"
Found = dict[str, Tensor]


def at(ir: TrainingGraph, name: str) -> fx.Node:
    return next(n for n in ir.nodes(LAST) if n.target == f"model.{name}")


def entry(ir: TrainingGraph) -> fx.Node:
    return ir.boundaries(consumer=LAST)[0].entry


def keep(ir: TrainingGraph, **values: fx.Node) -> None:
    """Keep gradients in states, to be looked at after the step."""
    for name, value in values.items():
        ir.assign(LAST, ir.state(LAST, name, value.meta["spec"]), value)


def kept(program: Program, *names: str) -> Found:
    return {name: program.root.aux[name].value.clone() for name in names}


def energy(ir: TrainingGraph, value: fx.Node) -> fx.Node:
    return ir.emit(LAST, mean_square, value, role="energy")


# Each case: what the graph keeps, and the same by hand, of h (what the last module reads) and the loss.


def within(ir: TrainingGraph) -> None:
    keep(ir, second=ir.gradient(ir.apply_loss(), at(ir, "second")))


def within_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    second = model[1:4](h)
    loss = functional.cross_entropy(model[4:](second), y)
    return {"second": torch.autograd.grad(loss, second)[0]}


def two_of_one(ir: TrainingGraph) -> None:
    loss = ir.apply_loss()
    keep(ir, second=ir.gradient(loss, at(ir, "second")), entry=ir.gradient(loss, entry(ir)))


def two_of_one_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    second = model[1:4](h)
    found = torch.autograd.grad(functional.cross_entropy(model[4:](second), y), (second, h))
    return dict(zip(("second", "entry"), found, strict=True))


def no_objective(ir: TrainingGraph) -> None:
    """Of a scalar that trains nothing, through values on which the loss trains as well."""
    scalar = energy(ir, at(ir, "relu2"))
    keep(ir, second=ir.gradient(scalar, at(ir, "second")), entry=ir.gradient(scalar, entry(ir)))


def no_objective_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    second = model[1:4](h)
    found = torch.autograd.grad(mean_square(model[4](second)), (second, h))
    return dict(zip(("second", "entry"), found, strict=True))


def one_of_two_objectives(ir: TrainingGraph) -> None:
    """Two objectives through one leaf, and the gradient of one of them."""
    ir.objective(LAST, energy(ir, at(ir, "second")), "energy")
    keep(
        ir, entry=ir.gradient(ir.apply_loss(), entry(ir)), relu1=ir.gradient(ir.apply_loss(), at(ir, "relu1"))
    )


def one_of_two_objectives_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    relu1 = model[1](h)
    found = torch.autograd.grad(functional.cross_entropy(model[2:](relu1), y), (h, relu1))
    return dict(zip(("entry", "relu1"), found, strict=True))


def not_reached(ir: TrainingGraph) -> None:
    """Of a value that comes after the scalar, and of a scalar that carries no tape at all."""
    scalar = energy(ir, at(ir, "second"))
    still = energy(ir, ir.stop_gradient(LAST, at(ir, "second"), role="detached"))
    later = ir.emit(LAST, torch.neg, at(ir, "third"))
    keep(ir, third=ir.gradient(scalar, later), constant=ir.gradient(still, at(ir, "relu2")))


def not_reached_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    return {"third": torch.zeros(len(h), 3).double(), "constant": torch.zeros(len(h), 8).double()}


def without_parameters(ir: TrainingGraph) -> None:
    """Of a value that no parameter makes, and that is read again without it."""
    turned = ir.emit(LAST, torch.neg, entry(ir), role="turned")
    both = ir.emit(LAST, torch.mul, turned, entry(ir))
    keep(ir, turned=ir.gradient(energy(ir, both), turned))


def without_parameters_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    turned = -h.detach()
    turned.requires_grad_()
    return {"turned": torch.autograd.grad(mean_square(turned * h.detach()), turned)[0]}


def of_leaves(ir: TrainingGraph) -> None:
    """Of a parameter and of the model's input, in the form that the errors name."""
    weight = ir.stop_gradient(LAST, ir.read(LAST, "model.third.weight"), role="leaf")
    third = ir.read(LAST, "model.third", role="module")
    output = ir.emit(LAST, call_with, third, {"weight": weight}, (at(ir, "relu2"),), {})
    x = ir.stop_gradient(LAST, ir.inputs[0], role="leaf")
    scalar = ir.emit(LAST, operator.add, ir.loss_of(LAST, output), energy(ir, x))
    keep(ir, weight=ir.gradient(scalar, weight), x=ir.gradient(scalar, x))


def of_leaves_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    loss = functional.cross_entropy(model[1:](h), y)
    x = batch(len(h), torch.float64)[0]
    return {"weight": torch.autograd.grad(loss, model[5].weight)[0], "x": 2 * x / x.numel()}


class Giver(nn.Module):
    """Returns a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(3.0).double())

    def forward(self) -> Tensor:
        return self.bias


def of_what_a_module_gives(ir: TrainingGraph) -> None:
    bias = ir.call(LAST, ir.add_module("giver", Giver()))
    ir.objective(LAST, energy(ir, bias), "bias")
    scalar = ir.emit(LAST, torch.sum, bias)
    ir.objective(LAST, scalar, "sum")
    keep(ir, given=ir.gradient(scalar, bias))


def of_what_a_module_gives_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    return {"given": torch.ones(3).double()}


def in_a_region(ir: TrainingGraph) -> None:
    """In each round, with respect to values from before the region, through a tape from before it."""
    ir.objective(LAST, ir.apply_loss(), "loss")
    start = ir.emit(LAST, torch.zeros_like, ir.stop_gradient(LAST, ir.output, role="like"))
    before = set(ir.graph.nodes)
    code = ir.emit(LAST, carry, start)
    scalar = energy(ir, ir.emit(LAST, torch.add, ir.output, code))
    slope = ir.gradient(scalar, entry(ir))
    moved = ir.emit(LAST, moved_by, code, slope, ir.gradient(scalar, at(ir, "third")))
    repeat(ir, "rounds", before)
    ir.repeats["rounds"] = Repeat("rounds", 3, ((code, moved),))
    keep(ir, moved=ir.stop_gradient(LAST, moved, role="end"))


def moved_by(code: Tensor, slope: Tensor, other: Tensor) -> Tensor:
    return code - other + slope[:, :3]


def in_a_region_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    third = model[1:](h)
    code = torch.zeros_like(third)
    for _ in range(3):
        slope, other = torch.autograd.grad(mean_square(third + code), (h, third), retain_graph=True)
        code = moved_by(code, slope, other)
    return {"moved": code}


def round_by_round(ir: TrainingGraph) -> None:
    """No tape leads into a round: not from the round before, nor into the first one."""
    before = set(ir.graph.nodes)
    code = ir.emit(LAST, carry, at(ir, "third"))
    leaf = ir.stop_gradient(LAST, code, role="leaf")
    scalar = energy(ir, ir.emit(LAST, torch.mul, leaf, code))
    moved = ir.emit(LAST, grown, leaf, ir.gradient(scalar, leaf), ir.gradient(scalar, at(ir, "third")))
    repeat(ir, "rounds", before)
    ir.repeats["rounds"] = Repeat("rounds", 3, ((code, moved),))
    keep(ir, moved=ir.stop_gradient(LAST, moved, role="end"))


def grown(code: Tensor, slope: Tensor, none: Tensor) -> Tensor:
    return torch.tanh(code + slope + 100 * none)


def round_by_round_by_hand(model: nn.Sequential, h: Tensor, y: Tensor) -> Found:
    code = model[1:](h).detach()
    for _ in range(3):
        leaf = code.clone().requires_grad_()
        (slope,) = torch.autograd.grad(mean_square(leaf * code), leaf)
        code = grown(code, slope, torch.zeros(()))
    return {"moved": code}


CASES: dict[str, tuple[Callable[[TrainingGraph], None], Callable[[nn.Sequential, Tensor, Tensor], Found]]] = {
    "within a module": (within, within_by_hand),
    "two of one scalar": (two_of_one, two_of_one_by_hand),
    "no objective": (no_objective, no_objective_by_hand),
    "one of two objectives": (one_of_two_objectives, one_of_two_objectives_by_hand),
    "not reached": (not_reached, not_reached_by_hand),
    "without parameters": (without_parameters, without_parameters_by_hand),
    "of leaves": (of_leaves, of_leaves_by_hand),
    "of what a module gives": (of_what_a_module_gives, of_what_a_module_gives_by_hand),
    "in a region": (in_a_region, in_a_region_by_hand),
    "round by round": (round_by_round, round_by_round_by_hand),
}


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_is_that_of_autograd(case: str) -> None:
    rewrite, by_hand = CASES[case]

    def whole(ir: TrainingGraph) -> None:
        rewrite(ir)
        done = [LAST] if any(n.meta["objective"] == f"{LAST}.loss" for n in ir.objectives()) else []
        finish(ir, *done)

    model = mlp().double()
    program = compiled(model, Rule(whole), ["first"], optimizer=sgd(0.1), verify=False)
    x, y = batch(dtype=torch.float64)
    assert_lowered(program, x, y)
    for _ in range(2):
        h = model[0](x).detach().requires_grad_()
        wanted = {name: value.detach() for name, value in by_hand(model, h, y).items()}
        program.step(x, y)
        for name, value in kept(program, *wanted).items():
            assert torch.allclose(value, wanted[name], rtol=0, atol=1e-12), name


# ---- what is refused -----------------------------------------------------------------------------


def refused(scalar: Callable[[TrainingGraph], fx.Node], wrt: Callable[[TrainingGraph], fx.Node]) -> str:
    with pytest.raises(GraphError) as error:
        compiled(mlp(), Rule(lambda ir: ir.gradient(scalar(ir), wrt(ir))), ["first"])
    return str(error.value)


def loss(ir: TrainingGraph) -> fx.Node:
    return ir.apply_loss()


def test_the_errors_say_which_form_to_write():
    foreign = refused(loss, lambda ir: ir.boundaries()[0].value)
    assert "'loss' of 'output' with respect to 'first' of 'first'" in foreign
    assert "leaf = ir.stop_gradient('output', value, role='leaf')" in foreign
    data = refused(loss, lambda ir: ir.inputs[0])
    assert "leaf = ir.stop_gradient('output', value, role='leaf')" in data
    weight = refused(loss, lambda ir: ir.read(LAST, "model.third.weight"))
    assert "leaf = ir.stop_gradient('output', parameter)" in weight
    whole = refused(loss, lambda ir: ir.emit(LAST, torch.argmax, ir.output, 1, name="best"))
    assert "'best' is i64[B]" in whole
    carried = refused(loss, lambda ir: ir.emit(LAST, carry, entry(ir)))
    assert "leaf = ir.stop_gradient('output', entry, role='leaf')" in carried
    rows = refused(lambda ir: ir.output, entry)
    assert "takes the gradient of 'third', which is f32[B,3] and must be 0-d; take its mean or sum" in rows
