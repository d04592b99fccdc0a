"""What a certificate says of values that come from earlier steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import locc
from locc import Method, Pass, Program
from locc.facts import NOT, STRICT, WEAK, Flow
from locc.facts.critical import critical_path
from locc.facts.derive import derive
from locc.ir import TrainingGraph, inner
from locc.lower import Assign, Backward, instructions_of
from locc.rewrite import OutputLoss, add_all, returning, squared_distance
from locc.testing import assert_lowered, assert_pipeline_exact, assert_side_by_side
from support import batch, compiled, every_method

Carry = Callable[[TrainingGraph, str, fx.Node], fx.Node]


def at_once(ir: TrainingGraph, owner: str, gradient: fx.Node) -> fx.Node:
    return ir.stop_gradient(owner, gradient)


def delayed_by_the_sender(ir: TrainingGraph, owner: str, gradient: fx.Node) -> fx.Node:
    return ir.stop_gradient(owner, ir.delay(gradient, 2))


def delayed_by_the_reader(ir: TrainingGraph, owner: str, gradient: fx.Node) -> fx.Node:
    return ir.delay(ir.stop_gradient(owner, gradient), 1)


def in_a_buffer(ir: TrainingGraph, owner: str, gradient: fx.Node) -> fx.Node:
    """Its mean over the batch, in a buffer of a module that `ir.state` knows nothing of."""
    holder = nn.Module()
    holder.register_buffer("kept", torch.zeros(4))
    sender = str(gradient.meta["owner"])
    path = f"{ir.add_module(f'kept_{gradient.name}', holder)}.kept"
    ir.assign(sender, path, ir.emit(sender, torch.mean, gradient, 0))
    return ir.stop_gradient(owner, ir.read(sender, path))


def averaged(ir: TrainingGraph, owner: str, gradient: fx.Node) -> fx.Node:
    sender = str(gradient.meta["owner"])
    mean = ir.state(sender, f"mean_{gradient.name}", gradient.meta["spec"])
    ir.assign(sender, mean, ir.emit(sender, torch.lerp, mean, gradient, 0.1))
    return ir.stop_gradient(owner, mean)


def averaged_from_one(ir: TrainingGraph, owner: str, gradient: fx.Node) -> fx.Node:
    sender = str(gradient.meta["owner"])
    mean = ir.state(sender, f"mean_{gradient.name}", gradient.meta["spec"], initial=1.0)
    ir.assign(sender, mean, ir.emit(sender, torch.lerp, mean, gradient, 0.1))
    return ir.stop_gradient(owner, mean)


def squared(ir: TrainingGraph, owner: str, gradient: fx.Node) -> fx.Node:
    """Zero where the gradient is zero, but not linear in it."""
    sender = str(gradient.meta["owner"])
    return ir.stop_gradient(owner, ir.emit(sender, torch.mul, ir.delay(gradient, 1), gradient))


@dataclass(frozen=True)
class Carried(Pass):
    carry: Carry

    def rewrite(self, ir: TrainingGraph) -> None:
        for module in reversed(ir.modules[:-1]):
            terms = [
                ir.emit(module.name, inner, h, self.carry(ir, module.name, g), role="chain")
                for h in ir.crossing(module.name)
                for g in returning(ir, h)
            ]
            ir.objective(module.name, add_all(ir, module.name, terms), "chain")


@dataclass(frozen=True)
class Of(Method):
    """Whatever passes it is given."""

    family: ClassVar[str] = "test"
    reference: ClassVar[str] = "none"
    steps: Sequence[Pass] = ()

    def passes(self) -> Sequence[Pass]:
        return self.steps


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)), nn.Linear(4, 3))


def program(*steps: Pass) -> Program:
    return compiled(chain(), Of(tuple(steps)), ["0", "1", "2"])


def gradients(found: Program) -> list[Flow]:
    return [f for f in found.certificate.flows if f.direction == "down"]


# ---- gradients that arrive late ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("carry", "kind", "staleness"),
    [
        (at_once, "gradient", 0),
        (delayed_by_the_sender, "gradient", 2),
        (delayed_by_the_reader, "gradient", 0),  # it crosses at once, and waits at its reader
        (in_a_buffer, "gradient", 1),
        (averaged, "gradient", 1),
        (averaged_from_one, "target", 1),  # more than a gradient, but linear in one
    ],
)
def test_a_late_gradient_is_named_as_what_it_is(carry: Carry, kind: str, staleness: int) -> None:
    found = program(OutputLoss(), Carried(carry))
    assert [(f.kind, f.staleness) for f in gradients(found)] == [(kind, staleness)] * 3
    certificate = found.certificate
    assert certificate.verdict == NOT
    assert certificate.table.backward_pass == "end to end"
    first = certificate.owner("0")
    assert first.gradient_hops == 3
    assert first.depends_on == ("1", "2", "3")
    if kind == "gradient":
        assert sorted(f.hops for f in gradients(found)) == [1, 2, 3]


def test_what_is_late_is_not_waited_for() -> None:
    now = program(OutputLoss(), Carried(at_once)).certificate
    late = program(OutputLoss(), Carried(delayed_by_the_sender)).certificate
    assert now.owner("0").backward_waits_for == ("1", "2", "3")
    assert now.owner("0").backward_depth == 3
    assert late.owner("0").backward_waits_for == late.owner("0").update_waits_for == ()
    assert now.table.forward_pass
    assert not late.table.forward_pass
    assert "(down), through 3 modules, 2 steps old" in late.text(verbose=True)
    assert "trains on values of earlier steps of 1, 2, 3" in late.text(verbose=True)
    assert locc.Certificate.from_json(late.to_json()) == late


def test_the_square_of_a_late_gradient_is_no_chain_rule() -> None:
    certificate = program(OutputLoss(), Carried(squared)).certificate
    assert certificate.verdict == WEAK
    assert certificate.owner("0").trains_on_gradient is None
    assert {f.kind for f in certificate.flows if f.direction == "down"} == {"target"}


@dataclass(frozen=True)
class LateTargets(Pass):
    """Each module steps towards what its reader's gradient of the last step would have made of its output."""

    def rewrite(self, ir: TrainingGraph) -> None:
        for module in reversed(ir.modules[:-1]):
            (h,) = ir.crossing(module.name)
            (g,) = returning(ir, h)
            bounded = ir.emit(str(g.meta["owner"]), torch.tanh, ir.emit(str(g.meta["owner"]), torch.exp, g))
            target = ir.stop_gradient(module.name, ir.delay(bounded, 1))
            ir.objective(module.name, ir.emit(module.name, squared_distance, h, target), "target")


def test_a_late_target_is_weakly_modular_though_nothing_waits() -> None:
    certificate = program(OutputLoss(), LateTargets()).certificate
    assert certificate.verdict == WEAK
    assert all(not o.update_locked for o in certificate.owners)
    assert certificate.owner("2").depends_on == ("3",)
    assert certificate.reasons[-1] == (
        "'2' depends on a gradient through the layers of '3' (one hop), of earlier steps"
    )
    assert certificate.table.backward_pass == "3 hops"


# ---- activations that arrive late ------------------------------------------------------------------


@dataclass(frozen=True)
class LateInputs(Pass):
    """Every module but the first trains on what the one below sent a step before."""

    def rewrite(self, ir: TrainingGraph) -> None:
        for module in ir.modules:
            out = ir.crossing(module.name)[0] if module is not ir.last else ir.prediction
            for boundary in ir.boundaries(consumer=module.name):
                late = ir.stop_gradient(module.name, ir.delay(boundary.value, 1), role="late")
                (out,) = ir.replay(module.name, {boundary.entry: late}, [out], "late")
            ir.objective(module.name, ir.emit(module.name, _spread, out, role="late"), "late")


def _spread(h: Tensor) -> Tensor:
    return h.square().mean()


def test_a_late_activation_locks_nothing_and_may_run_in_a_pipeline() -> None:
    found = program(LateInputs())
    certificate = found.certificate
    late = [f for f in certificate.flows if f.staleness]
    assert [(f.kind, f.direction, f.staleness) for f in late] == [("activation", "up", 1)] * 3
    assert certificate.verdict == STRICT
    assert certificate.pipeline_exact
    assert not any(o.forward_locked for o in certificate.owners)
    x, y = batch()
    batches = [(x + i, y) for i in range(5)]
    assert_lowered(found, x, y, steps=3)
    assert_side_by_side(found, batches)
    assert_pipeline_exact(found, batches)


# ---- what a step waits for ------------------------------------------------------------------------


def _later_in_plan(found: Program, owner: str) -> set[str]:
    """Return the later modules whose work an owner's updates need, by the plan's reads and writes."""
    instructions = list(instructions_of(found.plan().instructions))
    maker = {name: i for i in instructions for name in i.writes}
    parameters = dict(found.root.named_parameters())
    todo = [
        i
        for i in instructions
        if i.owner == owner
        and ((isinstance(i, Backward) and i.objectives) or (isinstance(i, Assign) and i.path in parameters))
    ]
    seen: list[object] = []
    while todo:
        instruction = todo.pop()
        if instruction not in seen:
            seen.append(instruction)
            todo += [maker[name] for name in instruction.reads if name in maker]
    rank = derive(found.ir).rank  # `al` has another order than the network: labels begin at its end
    # An instruction that reads nothing lends what an earlier step has left.
    return {i.owner for i in seen if rank[i.owner] > rank[owner] and i.reads}


METHODS = every_method(but=["gim"])  # undefined on the chain


@pytest.mark.parametrize("method", [*METHODS, Of((OutputLoss(), Carried(delayed_by_the_sender)))])
def test_an_update_waits_for_what_the_plan_computes_before_it(method: str | Method) -> None:
    found = compiled(chain(), method, ["0", "1", "2"])
    waits = {o.name: set(o.update_waits_for) for o in found.certificate.owners}
    assert waits == {name: _later_in_plan(found, name) for name in waits}


# ---- closed forms ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepDown(Pass):
    """A closed-form sweep: targets go down by a matrix product for each module, and no layer runs."""

    def rewrite(self, ir: TrainingGraph) -> None:
        target = ir.emit(ir.last.name, torch.tanh, ir.prediction)
        for module in reversed(ir.modules[:-1]):
            (h,) = ir.crossing(module.name)
            above = ir.stop_gradient(module.name, target, role="target")
            matrix = ir.stop_gradient(module.name, h)
            target = ir.emit(module.name, _solve, above, matrix, role="solve")
            ir.objective(module.name, ir.emit(module.name, squared_distance, h, target), "target")


def _solve(above: Tensor, h: Tensor) -> Tensor:
    return h @ (h.T @ above)[:, :1] + torch.zeros_like(h)


def test_the_critical_path_holds_a_closed_form_sweep() -> None:
    found = program(SweepDown())
    assert critical_path(found.ir) == [
        *(f"{name} forward" for name in "0123"),
        *(f"{name} forward" for name in "210"),  # the three solutions, one after the other
        "0 backward",
    ]
