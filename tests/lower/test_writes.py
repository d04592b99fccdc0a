"""A write runs after all that reads the old value, under whatever path: by the reference, and by hand."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc.ir import Repeat, TensorSpec, TrainingGraph, call_with, carry, inner, ops
from locc.testing import assert_lowered
from rules import Rule, finish, mean_square, repeat, sent
from support import batch, compiled, sgd

FIRST, LAST = "first", "last"
SPEC = TensorSpec((2, 3), torch.float64)
START = torch.arange(6.0, dtype=torch.float64).view(2, 3)


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.add_module(FIRST, nn.Linear(4, 6, dtype=torch.float64))
        self.add_module(LAST, nn.Linear(6, 3, dtype=torch.float64))


class Table(nn.Module):
    """Holds a table, and weighs it; gives it away for each sample."""

    def __init__(self, table: Tensor, spare: bool = False) -> None:
        super().__init__()
        self.register_buffer("table", table)
        if spare:
            self.register_buffer("unit", torch.ones((), dtype=torch.float64))

    def forward(self, by: Tensor) -> Tensor:
        return weighed(self.table, by) * getattr(self, "unit", 1.0)


class Giver(Table):
    def forward(self, by: Tensor) -> Tensor:
        return self.table.expand(len(by), 2, 3)


def weighed(table: Tensor, by: Tensor) -> Tensor:
    return (table * by).sum()


def spread(h: Tensor) -> Tensor:
    """A new table, as early as the first module's output is there."""
    return h.mean() * torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.5, -0.5]], dtype=h.dtype)


def late(ir: TrainingGraph) -> fx.Node:
    """The loss, which the first module sees last of all."""
    return ir.stop_gradient(FIRST, ir.apply_loss())


def write(ir: TrainingGraph, state: fx.Node | str) -> None:
    h = ir.stop_gradient(FIRST, sent(ir, FIRST), role="detached")
    ir.assign(FIRST, state, ir.emit(FIRST, spread, h))


def see(ir: TrainingGraph, found: fx.Node) -> None:
    """The first module's objective: what it has read, off its tape, and something that trains it."""
    size = ir.emit(FIRST, mean_square, sent(ir, FIRST))
    found = ir.stop_gradient(FIRST, found, role="detached")
    ir.objective(FIRST, ir.emit(FIRST, operator.add, size, found), "seen")


def table(ir: TrainingGraph) -> fx.Node:
    return ir.state(FIRST, "table", SPEC, START)


def holder(ir: TrainingGraph, module: nn.Module, name: str = "holder") -> str:
    return ir.add_module(name, module)


# ---- readers of a table that the first module assigns ---------------------------------------------


def by_its_path(ir: TrainingGraph) -> fx.Node:
    state = table(ir)
    write(ir, state)
    return ir.emit(FIRST, weighed, state, late(ir))


def by_a_view(*views: tuple[Callable[..., Tensor], object]) -> Callable[[TrainingGraph], fx.Node]:
    """Views are made early and read late."""

    def rewrite(ir: TrainingGraph) -> fx.Node:
        state = found = table(ir)
        write(ir, state)
        for function, *rest in views:
            found = ir.emit(FIRST, function, found, *rest)
        return ir.emit(FIRST, weighed, found, late(ir))

    return rewrite


def by_a_module(ir: TrainingGraph) -> fx.Node:
    path = holder(ir, Table(START.clone()))
    write(ir, f"{path}.table")
    return ir.call(FIRST, path, late(ir))


def by_another_path(ir: TrainingGraph) -> fx.Node:
    shared = START.clone()
    one, other = (holder(ir, Table(shared), name) for name in ("one", "other"))
    write(ir, f"{one}.table")
    return ir.emit(FIRST, weighed, ir.read(FIRST, f"{other}.table"), late(ir))


def by_a_module_of_another_path(ir: TrainingGraph) -> fx.Node:
    shared = START.clone()
    one, other = (holder(ir, Table(shared), name) for name in ("one", "other"))
    write(ir, f"{one}.table")
    return ir.call(FIRST, other, late(ir))


def by_a_module_of_which_a_part_is_replaced(ir: TrainingGraph) -> fx.Node:
    path = holder(ir, Table(START.clone(), spare=True))
    write(ir, f"{path}.table")
    unit = ir.emit(FIRST, torch.ones, (), dtype=torch.float64)
    return ir.emit(FIRST, call_with, ir.read(FIRST, path, "module"), {"unit": unit}, (late(ir),), {})


def by_a_quiet_module(ir: TrainingGraph) -> fx.Node:
    path = holder(ir, Table(START.clone()))
    write(ir, f"{path}.table")
    return ir.emit(FIRST, ops.call_quietly, ir.read(FIRST, path, "module"), (late(ir),), {})


def by_a_value_in_flight(ir: TrainingGraph) -> fx.Node:
    """What only the run shows to lie in the table's memory: it has a row for each sample."""
    path = holder(ir, Giver(START.clone()))
    write(ir, f"{path}.table")
    given = ir.call(FIRST, path, sent(ir, FIRST))
    return ir.emit(FIRST, weighed, ir.emit(FIRST, torch.select, given, 0, 0), late(ir))


def by_another_owner(ir: TrainingGraph) -> fx.Node:
    state = table(ir)
    write(ir, state)
    lent = ir.stop_gradient(LAST, state)
    return ir.stop_gradient(
        FIRST, ir.emit(LAST, weighed, lent, ir.stop_gradient(LAST, ir.apply_loss(), "late"))
    )


def within_a_region(ir: TrainingGraph) -> fx.Node:
    """The region reads the table in each round, and it is assigned outside."""
    state = table(ir)
    write(ir, state)
    start = late(ir)
    before = set(ir.graph.nodes)
    code = ir.emit(FIRST, carry, start)
    moved = ir.emit(FIRST, weighed, state, code)
    repeat(ir, "rounds", before)
    ir.repeats["rounds"] = Repeat("rounds", 2, ((code, moved),))
    return ir.stop_gradient(FIRST, moved, role="end")


def in_each_round(ir: TrainingGraph) -> fx.Node:
    """Every round reads the table of before the round, and assigns another."""
    state, start = table(ir), late(ir)
    before = set(ir.graph.nodes)
    code = ir.emit(FIRST, carry, start)
    ir.assign(FIRST, state, ir.emit(FIRST, torch.mul, state, 0.5))
    slow = ir.emit(FIRST, torch.tanh, code)
    moved = ir.emit(FIRST, weighed, state, slow)
    repeat(ir, "rounds", before)
    ir.repeats["rounds"] = Repeat("rounds", 2, ((code, moved),))
    return ir.stop_gradient(FIRST, moved, role="end")


def halved(old: Tensor, h: Tensor) -> Tensor:
    return old / 4


def as_written(old: Tensor, h: Tensor) -> Tensor:
    return spread(h)


def twice(old: Tensor, by: Tensor) -> Tensor:
    return weighed(old, weighed(old, by))


def rounds(old: Tensor, by: Tensor) -> Tensor:
    return weighed(old / 2, torch.tanh(weighed(old, torch.tanh(by))))


@dataclass(frozen=True)
class Reading:
    """How a table is read: in the graph, and by hand from the table of before the step."""

    rewrite: Callable[[TrainingGraph], fx.Node]
    reads: Callable[[Tensor, Tensor], Tensor] = weighed
    after: Callable[[Tensor, Tensor], Tensor] = as_written


READINGS = {
    "its path": Reading(by_its_path),
    "an element": Reading(by_a_view((operator.getitem, 0)), lambda old, by: weighed(old[0], by)),
    "a slice": Reading(
        by_a_view((operator.getitem, (slice(None), slice(1, None)))), lambda old, by: weighed(old[:, 1:], by)
    ),
    "a view of a view": Reading(
        by_a_view((torch.t,), (operator.getitem, 1)), lambda old, by: weighed(old.T[1], by)
    ),
    "a module": Reading(by_a_module),
    "another path": Reading(by_another_path),
    "a module of another path": Reading(by_a_module_of_another_path),
    "call_with": Reading(by_a_module_of_which_a_part_is_replaced),
    "call_quietly": Reading(by_a_quiet_module),
    "a value in flight": Reading(by_a_value_in_flight),
    "another owner": Reading(by_another_owner),
    "a region": Reading(within_a_region, twice),
    "each round": Reading(in_each_round, rounds, halved),
}


@pytest.mark.parametrize("case", READINGS)
def test_a_state_is_assigned_after_what_reads_it(case: str) -> None:
    reading = READINGS[case]

    def whole(ir: TrainingGraph) -> None:
        see(ir, reading.rewrite(ir))
        finish(ir, FIRST)

    model = Net()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, Rule(whole), [FIRST], optimizer=sgd(0.1), verify=False)
    assert_lowered(program, x, y)
    old, by_hand = START, copy.deepcopy(model)
    parts = [(part, torch.optim.SGD(part.parameters(), 0.1)) for part in by_hand]
    for _ in range(3):
        h = parts[0][0](x)
        loss = functional.cross_entropy(parts[1][0](h.detach()), y)
        found, old = reading.reads(old, loss.detach()), reading.after(old, h.detach())
        for (_, optimizer), scalar in zip(parts, (mean_square(h), loss), strict=True):
            optimizer.zero_grad()
            scalar.backward()
            optimizer.step()
        seen = program.step(x, y).objectives["first.seen"]
        assert float(seen) == pytest.approx(float(found + mean_square(h).detach()), abs=1e-12)


# ---- readers of a parameter that the first module trains ------------------------------------------


def lent(ir: TrainingGraph) -> None:
    """The last module reads the first one's weight, which is updated long before."""
    weight = ir.stop_gradient(LAST, ir.read(FIRST, "model.first.weight"))
    loss = ir.apply_loss()
    seen = ir.emit(LAST, weighed, weight, ir.stop_gradient(LAST, loss, "late"))
    ir.objective(LAST, ir.emit(LAST, operator.add, loss, seen), "seen")
    finish(ir, LAST)


def lent_by_hand(first: nn.Linear, last: nn.Linear, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    h = first(x)
    loss = functional.cross_entropy(last(h.detach()), y)
    return {FIRST: mean_square(h), LAST: loss + weighed(first.weight.detach(), loss.detach())}


def product(logits: Tensor, weight: Tensor) -> Tensor:
    return logits @ weight[:3]


def lent_on_a_tape(ir: TrainingGraph) -> None:
    """A view of the weight is on a tape of the last module, which waits for a value of the first one.

    That comes after the gradient on which the first module trains.
    """
    turned = ir.emit(FIRST, torch.t, ir.read(FIRST, "model.first.weight"))
    projected = ir.emit(LAST, product, ir.output, ir.stop_gradient(LAST, turned))
    (boundary,) = ir.boundaries()
    slope = ir.stop_gradient(FIRST, ir.gradient(ir.apply_loss(), boundary.entry))
    ir.objective(FIRST, ir.emit(FIRST, inner, sent(ir, FIRST), slope), "chain")
    weight = ir.stop_gradient(LAST, ir.emit(FIRST, mean_square, slope))
    ir.objective(LAST, ir.emit(LAST, operator.mul, ir.emit(LAST, mean_square, projected), weight), "seen")


def lent_on_a_tape_by_hand(first: nn.Linear, last: nn.Linear, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    h = first(x)
    entry = h.detach().requires_grad_()
    logits = last(entry)
    (slope,) = torch.autograd.grad(functional.cross_entropy(logits, y), entry, retain_graph=True)
    seen = mean_square(product(logits, first.weight.detach().T)) * mean_square(slope)
    return {FIRST: inner(h, slope), LAST: seen}


def gradient(ir: TrainingGraph) -> None:
    """A gradient of the first module is taken late, through its weight, which is updated early."""
    x = ir.stop_gradient(FIRST, ir.inputs[0], role="leaf")
    (again,) = ir.replay(FIRST, {ir.inputs[0]: x}, [sent(ir, FIRST)], "replay")
    slope = ir.gradient(ir.emit(FIRST, weighed, again, late(ir)), x)
    seen = ir.emit(LAST, mean_square, ir.stop_gradient(LAST, slope))
    ir.objective(LAST, ir.emit(LAST, operator.add, ir.apply_loss(), seen), "seen")
    finish(ir, LAST)


def gradient_by_hand(first: nn.Linear, last: nn.Linear, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    h = first(x)
    loss = functional.cross_entropy(last(h.detach()), y)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(weighed(first(leaf), loss.detach()), leaf)
    return {FIRST: mean_square(h), LAST: loss + mean_square(slope)}


def gradient_in_a_region(ir: TrainingGraph) -> None:
    """The same in each round of a region, from a tape of before it."""
    x = ir.stop_gradient(FIRST, ir.inputs[0], role="leaf")
    (again,) = ir.replay(FIRST, {ir.inputs[0]: x}, [sent(ir, FIRST)], "replay")
    start = late(ir)
    before = set(ir.graph.nodes)
    code = ir.emit(FIRST, carry, start)
    moved = ir.emit(FIRST, mean_square, ir.gradient(ir.emit(FIRST, weighed, again, code), x))
    repeat(ir, "rounds", before)
    ir.repeats["rounds"] = Repeat("rounds", 2, ((code, moved),))
    ir.objective(LAST, ir.emit(LAST, operator.add, ir.apply_loss(), ir.stop_gradient(LAST, moved)), "seen")
    finish(ir, LAST)


def gradient_in_a_region_by_hand(
    first: nn.Linear, last: nn.Linear, x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    h = first(x)
    loss = functional.cross_entropy(last(h.detach()), y)
    leaf, code = x.clone().requires_grad_(), loss.detach()
    for _ in range(2):
        code = mean_square(torch.autograd.grad(weighed(first(leaf), code), leaf)[0])
    return {FIRST: mean_square(h), LAST: loss + code}


TRAINED = {
    "lent": (lent, lent_by_hand),
    "lent on a tape": (lent_on_a_tape, lent_on_a_tape_by_hand),
    "a gradient": (gradient, gradient_by_hand),
    "a gradient in a region": (gradient_in_a_region, gradient_in_a_region_by_hand),
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_parameter_is_updated_after_what_reads_it(case: str) -> None:
    rewrite, scalars = TRAINED[case]
    model = Net()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, Rule(rewrite), [FIRST], optimizer=sgd(0.1), verify=False)
    assert_lowered(program, x, y)
    by_hand = copy.deepcopy(model)
    optimizers = {name: torch.optim.SGD(part.parameters(), 0.1) for name, part in by_hand.named_children()}
    for _ in range(3):
        found = scalars(*by_hand, x, y)
        for name in reversed(found):  # through a weight that is not updated yet
            found[name].backward(inputs=list(by_hand.get_submodule(name).parameters()))
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        seen = program.step(x, y).objectives["last.seen"]
        assert float(seen) == pytest.approx(float(found[LAST].detach()), abs=1e-12)


# ---- states in the place of each other ------------------------------------------------------------


def test_two_states_change_places():
    def swap(ir: TrainingGraph) -> None:
        one, two = (ir.state(FIRST, name, SPEC, value) for name, value in (("one", 1.0), ("two", 2.0)))
        ir.assign(FIRST, one, two)
        ir.assign(FIRST, two, one)
        see(ir, ir.emit(FIRST, weighed, one, late(ir)))
        finish(ir, FIRST)

    program = compiled(Net(), Rule(swap), [FIRST], optimizer=sgd(0.1), verify=False)
    x, y = batch(dtype=torch.float64)
    assert_lowered(program, x, y)
    for one, two in ((2.0, 1.0), (1.0, 2.0)):
        program.step(x, y)
        found = {name: float(program.root.aux[name].value.mean()) for name in ("one", "two")}
        assert found == {"one": one, "two": two}
