"""The verdict follows the graph: methods under other names, and methods changed by one pass.

What is expected of a changed method follows from the definitions of `locc.facts.locking.modularity`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.facts import NOT, STRICT, WEAK
from locc.facts.derive import _probe, derive
from locc.ir import TrainingGraph, inner, stop_gradient
from locc.proof import Certificate
from locc.rewrite import Method, Pass
from locc.rewrite.tangents import Derivative
from support import compiled, every_method

METHODS = every_method(but=["gim"])  # it needs positions
WIDTH = 6


def _certificate(method: str | Method) -> Certificate:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 3))
    options = {"example_inputs": torch.randn(4, WIDTH), "optimizer": torch.optim.Adam}
    return locc.compile(model, method, ["0", "1", "2"], **options).certificate


@dataclass(frozen=True)
class Changed(Method):
    """The passes of a method, and more, under a name, family and class that say nothing."""

    family: ClassVar[str] = "none"
    reference: ClassVar[str] = "none"

    method: Method
    more: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", self.method.target)

    def opened(self, model: nn.Module, splits: Sequence[str]) -> Iterator[str]:
        yield from self.method.opened(model, splits)

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        yield from self.method.requires(ir)

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        yield from self.method.advise(ir, rates)

    def passes(self) -> Sequence[Pass]:
        return (*self.method.passes(), *self.more, Unnamed())


@dataclass(frozen=True)
class Unnamed(Pass):
    """Takes from each node what it is for and who made it, but for what the partition calls so."""

    def rewrite(self, ir: TrainingGraph) -> None:
        for node in ir.graph.nodes:
            node.meta["made_by"] = "step"
            if node.meta.get("role") not in ("forward", "boundary"):
                node.meta["role"] = "step"


def _changed(method: str, *more: Pass) -> Certificate:
    return _certificate(Changed(locc.method(method), more))


# ---- under another name -----------------------------------------------------------------------


def _facts(certificate: Certificate) -> dict[str, Any]:
    """Everything that a certificate derives; not the title, the remark, and what was measured."""
    told = {field.name: getattr(certificate, field.name) for field in dataclasses.fields(certificate)}
    return {
        k: v for k, v in told.items() if k not in ("method", "training", "checks", "memory", "graph_hash")
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_method_under_another_name_gets_the_same_facts(method: str) -> None:
    original, disguised = _certificate(method), _changed(method)
    assert disguised.method == "Changed"
    assert _facts(disguised) == _facts(original)


# ---- changed by one pass ----------------------------------------------------------------------


@dataclass(frozen=True)
class FromAbove(Pass):
    """One more objective: the first module follows a gradient that came through the second one's layers."""

    def rewrite(self, ir: TrainingGraph) -> None:
        first, second = (module.name for module in ir.modules[:2])
        (value,) = ir.outputs(first)
        (entry,) = (b.entry for b in ir.boundaries(producer=first, consumer=second))
        leaf = ir.emit(second, stop_gradient, entry, spec=entry.meta["spec"])
        (again,) = ir.replay(second, {entry: leaf}, ir.nodes(second, "forward")[-1:], "again")
        arriving = ir.stop_gradient(first, ir.gradient(ir.emit(second, torch.sum, again), leaf))
        ir.objective(first, ir.emit(first, inner, value, arriving), "from_above")


@pytest.mark.parametrize("method", METHODS)
def test_one_objective_on_a_gradient_from_above_makes_any_method_not_modular(method: str) -> None:
    certificate = _changed(method, FromAbove())
    first = certificate.owner("0")
    assert certificate.verdict == NOT
    assert certificate.table.backward_pass == "end to end"
    assert not certificate.pipeline_exact
    assert first.trains_on_gradient is not None
    assert first.gradient_hops >= 1
    assert "1" in first.backward_waits_for
    assert "1" in first.update_waits_for


@dataclass(frozen=True)
class Arriving(Pass):
    """Replaces each gradient value that arrives at another owner by a function of it."""

    function: Callable[[Tensor], Tensor]

    def rewrite(self, ir: TrainingGraph) -> None:
        for gradient in ir.gradients():
            for arriving in [n for n in gradient.users if n.target is stop_gradient]:
                owner = arriving.meta["owner"]
                users = list(arriving.users)
                new = ir.emit(owner, self.function, arriving)
                for user in users:
                    user.replace_input_with(arriving, new)


@dataclass(frozen=True)
class Cut(Pass):
    """Lets no gradient value arrive at another owner: a constant stands in its place."""

    def rewrite(self, ir: TrainingGraph) -> None:
        for gradient in ir.gradients():
            for arriving in [n for n in gradient.users if n.target is stop_gradient]:
                owner, spec = arriving.meta["owner"], arriving.meta["spec"]
                new = ir.emit(owner, torch.ones, spec.concrete(2)[1:])
                arriving.replace_all_uses_with(new)
        while ended := [n for n in ir.gradients() if not any(u.users for u in n.users)]:
            for gradient in ended:
                for user in list(gradient.users):
                    ir.graph.erase_node(user)
                ir.graph.erase_node(gradient)


@pytest.mark.parametrize("method", ["bp", "fa", "dfa", "dni", "cdni"])
def test_without_the_gradients_that_cross_nothing_comes_back(method: str) -> None:
    certificate = _changed(method, Cut())
    assert certificate.verdict == STRICT
    assert certificate.pipeline_exact
    assert certificate.table.backward_pass == "none"
    assert not certificate.table.forward_pass
    assert not any(o.update_locked or o.backward_locked for o in certificate.owners)
    assert not any(flow.direction == "down" for flow in certificate.flows)


@pytest.mark.parametrize("method", ["dtp", "tp"])
def test_targets_still_come_from_above_without_the_gradient_that_starts_them(method: str) -> None:
    certificate = _changed(method, Cut())
    assert certificate.verdict == WEAK
    assert certificate.table.backward_pass == "none"
    assert certificate.owner("0").update_locked
    assert not certificate.owner("0").backward_locked
    assert ("1.inverse", "0") in {(f.producer, f.consumer) for f in certificate.flows}


def _rescaled(g: Tensor) -> Tensor:
    return -3.0 * g / g.shape[0]


@pytest.mark.parametrize("function", [torch.sign, _rescaled, torch.clone])
@pytest.mark.parametrize("method", ["bp", "fa"])
def test_an_image_of_the_gradient_is_still_the_gradient(
    method: str, function: Callable[[Tensor], Tensor]
) -> None:
    certificate = _changed(method, Arriving(function))
    assert certificate.verdict == NOT
    assert certificate.owner("0").gradient_hops == 3


def test_the_sign_of_the_output_error_is_still_no_backward_pass() -> None:
    certificate = _changed("dfa", Arriving(torch.sign))
    assert certificate.verdict == WEAK
    assert certificate.table.backward_pass == "none"


def test_a_synthesiser_that_regresses_onto_the_sign_still_waits_one_hop() -> None:
    certificate = _changed("dni", Arriving(torch.sign))
    assert certificate.verdict == WEAK
    assert certificate.table.backward_pass == "1 hop"


@dataclass(frozen=True)
class Instead(Pass):
    """Puts another function of h and g in the place of each <h, g>."""

    function: Callable[[Tensor, Tensor], Tensor]

    def rewrite(self, ir: TrainingGraph) -> None:
        for node in [n for n in ir.graph.nodes if n.target is inner]:
            node.target = self.function


def own_inner(h: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("bi,bi->", h, g) / 3.0


@pytest.mark.parametrize("method", ["bp", "fa"])
def test_an_own_function_that_is_linear_in_the_gradient_is_still_the_chain_rule(method: str) -> None:
    certificate = _changed(method, Instead(own_inner))
    assert certificate.verdict == NOT
    assert certificate.owner("0").gradient_hops == 3


def distance_to_target(h: Tensor, g: Tensor) -> Tensor:
    """No objective is linear in g any longer: h - g is a target."""
    return (h - (h.detach() - g)).square().sum()


@pytest.mark.parametrize("method", ["bp", "fa"])
def test_a_target_made_of_each_gradient_is_a_chain_of_hops_and_no_chain_rule(method: str) -> None:
    certificate = _changed(method, Instead(distance_to_target))
    assert certificate.verdict == WEAK
    assert certificate.table.backward_pass == "3 hops"
    assert certificate.owner("0").trains_on_gradient is None
    assert certificate.owner("0").backward_waits_for == ("1", "2", "3")


@dataclass(frozen=True)
class Feedback(Pass):
    """Direct feedback; the error is taken at the output, or through the last module's layers."""

    through: bool

    def rewrite(self, ir: TrainingGraph) -> None:
        last = ir.last.name
        ir.objective(last, ir.apply_loss(), "loss")
        if self.through:
            leaf, loss = ir.boundaries(consumer=last)[0].entry, ir.loss
        else:
            leaf = ir.emit(last, stop_gradient, ir.output, spec=ir.output.meta["spec"])
            loss = ir.emit(last, ir.loss_function, leaf, ir.target)
        assert loss is not None
        error = ir.gradient(loss, leaf)
        for module in ir.modules[:-1]:
            (value,) = ir.outputs(module.name)
            feedback = nn.Linear(WIDTH if self.through else 3, WIDTH, bias=False).requires_grad_(False)
            path, spec = ir.add_module(f"{module.name}.feedback", feedback), value.meta["spec"]
            delta = ir.call(module.name, path, ir.stop_gradient(module.name, error), spec=spec)
            ir.objective(module.name, ir.emit(module.name, inner, value, delta), "feedback")


@dataclass(frozen=True)
class Nothing(Method):
    """A method without passes, to be changed."""

    family: ClassVar[str] = "none"
    reference: ClassVar[str] = "none"

    def passes(self) -> Sequence[Pass]:
        return ()


def test_direct_feedback_of_an_error_that_came_through_layers_is_not_modular() -> None:
    certificate = _certificate(Changed(Nothing(), (Feedback(through=True),)))
    assert certificate.verdict == NOT
    assert certificate.owner("0").gradient_hops == 1
    assert certificate.owner("0").backward_waits_for == ("3",)


def test_direct_feedback_of_an_error_detached_from_the_layers_is_weakly_modular() -> None:
    certificate = _certificate(Changed(Nothing(), (Feedback(through=False),)))
    assert certificate.verdict == WEAK
    assert certificate.table.backward_pass == "none"
    assert certificate.owner("0").gradient_hops == 0
    assert certificate.owner("0").update_waits_for == ("1", "2", "3")  # whose forward leads to the error


@dataclass(frozen=True)
class Energy(Pass):
    """Each module lowers its own activity; no auxiliary network, no label below the last module."""

    def rewrite(self, ir: TrainingGraph) -> None:
        for module in ir.modules[:-1]:
            (value,) = ir.outputs(module.name)
            ir.objective(module.name, ir.emit(module.name, torch.mean, value), "energy")
        ir.objective(ir.last.name, ir.apply_loss(), "loss")


def test_without_auxiliary_networks_the_table_needs_none() -> None:
    with_heads, without = _changed("dgl"), _certificate(Changed(Nothing(), (Energy(),)))
    assert with_heads.table.auxiliary_model
    assert not without.table.auxiliary_model
    assert without.verdict == with_heads.verdict == STRICT
    assert all(o.networks == () for o in without.owners)
    labelled = {f.consumer for f in without.flows if f.kind == "label"}
    assert labelled == {"3"}
    assert {f.consumer for f in with_heads.flows if f.kind == "label"} == {"0", "1", "2", "3"}


def test_a_part_without_elements_is_linear_and_zero() -> None:
    """As a vision transformer's prefix of no tokens is, where a signal passes it."""

    class Prefix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.first(x))
            return self.third(self.second(torch.cat([h[:, :0], h], 1)).tanh())

    ir = compiled(Prefix(), "ifa", ["first", "second"]).ir
    empty = next(
        n for n in ir.graph.nodes if isinstance(n.target, Derivative) and n.meta["spec"].shape[1] == 0
    )
    moving = {n for n in empty.all_input_nodes if isinstance(n.target, Derivative)}
    known = derive(ir, 5, torch.zeros(5, dtype=torch.int64))
    assert _probe(ir, empty, moving, known) == (True, True)
