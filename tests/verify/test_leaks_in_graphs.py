"""Leaks in rewritten graphs, from passes that a third party could write, or built past the invariants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

import locc
from locc.ir import TrainingGraph, ops
from locc.proof import sentinel, static, walk
from locc.proof.experiment.batch import small_batch
from locc.proof.findings import REACHABILITY, SENTINEL, WALK

from .leaks import HARMLESS, LEAKS, OWN, Act, Chain, plain
from .plants import ThirdParty, bare_program

PLACES = ("network", "function")


def _planted(act: Act, own: bool, place: str) -> tuple[Chain, Callable[[], locc.Program]]:
    """Return a clean model, and what compiles it by a method whose pass plants an act."""
    torch.manual_seed(0)
    model = Chain(plain)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    method = ThirdParty(act, own, place)
    return model, lambda: locc.compile(model, method, ["a", "b", "c"], example_inputs=x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LEAKS)
def test_compile_refuses_a_leak_that_a_pass_adds_by_name(name: str, place: str) -> None:
    leak = LEAKS[name]
    model, build = _planted(leak.act, False, place)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(locc.LocalityError, match="method 'ThirdParty' is not local") as caught:
        build()
    assert leak.text.format(shared="aux.a_tap.shared") in str(caught.value)
    assert {finding.check for finding in caught.value.findings} == {leak.check}
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LEAKS)
def test_the_harmless_twin_of_a_leak_that_a_pass_adds_passes(name: str, place: str) -> None:
    leak = LEAKS[name]
    _passes_and_trains(*_planted(leak.harmless, leak.twin is OWN, place))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", HARMLESS)
def test_a_harmless_look_alike_that_a_pass_adds_passes(act: Act) -> None:
    _passes_and_trains(*_planted(act, False, "network"))


def _passes_and_trains(model: Chain, build: Callable[[], locc.Program]) -> None:
    program = build()
    assert program.certificate.complete
    assert program.certificate.verdict == "strictly modular"
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    program.step(x, y)
    program.step(x, y)


# ---- graphs built past the invariants ---------------------------------------------------------


def _boundary(ir: TrainingGraph, consumer: str) -> fx.Node:
    return ir.boundaries(consumer=consumer)[0].entry


def _objective(ir: TrainingGraph, owner: str) -> fx.Node:
    return ir.objectives(owner)[0]


def _drop_stop_gradient(ir: TrainingGraph) -> None:
    entry = _boundary(ir, "b")
    (value,) = entry.all_input_nodes
    entry.replace_all_uses_with(value)
    ir.graph.erase_node(entry)


def _identity_for_stop_gradient(ir: TrainingGraph) -> None:
    _boundary(ir, "b").target = torch.clone


def _swap_objective_owner(ir: TrainingGraph) -> None:
    _objective(ir, "b").meta["owner"] = "c"


def _swap_forward_owner(ir: TrainingGraph) -> None:
    next(n for n in ir.nodes("b", "forward") if n.op == "call_module").meta["owner"] = "c"


def _merge_objectives(ir: TrainingGraph) -> None:
    one, other = _objective(ir, "a"), _objective(ir, "b")
    scalar = other.args[0]
    with ir.graph.inserting_before(other):
        total = ir.graph.call_function(torch.add, (scalar, one.args[0]))
    total.meta.update(owner="b", role="loss", made_by="mutant", spec=None)
    other.args = (total,)


def _reroute_edge(ir: TrainingGraph) -> None:
    """The head of `b` reads what `a` computes, live."""
    entry = _boundary(ir, "b")
    (value,) = entry.all_input_nodes
    user = next(n for n in ir.nodes("b") if n.op == "call_module" and str(n.target).startswith("aux."))
    user.args = (value,)


def _straight_through(ir: TrainingGraph) -> None:
    entry = _boundary(ir, "b")
    (value,) = entry.all_input_nodes
    with ir.graph.inserting_after(entry):
        node = ir.graph.call_function(_through, (entry, value))
    node.meta.update(owner="b", role="compute", made_by="mutant", spec=None)
    entry.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def _through(x: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    return x + (torch.round(live) - live).detach() + live


def _two_owners(ir: TrainingGraph) -> None:
    """`b` calls the layer of `a`."""
    next(n for n in ir.nodes("b", "forward") if n.op == "call_module").target = "model.a"


GRAPHS: dict[str, tuple[Callable[[TrainingGraph], None], str]] = {
    "drop a stop_gradient": (
        _drop_stop_gradient,
        "objective 'b.loss' of 'b' reaches parameter 'a.0.weight', which 'a' owns",
    ),
    "identity for stop_gradient": (
        _identity_for_stop_gradient,
        "'b.loss' of 'b' reaches parameter 'a.0.weight'",
    ),
    "merge two objectives": (_merge_objectives, "objective 'b.loss' of 'b' reaches parameter 'a.0.weight'"),
    "reroute an edge": (_reroute_edge, "objective 'b.loss' of 'b' reaches parameter 'a.0.weight'"),
    "straight-through": (_straight_through, "objective 'b.loss' of 'b' reaches parameter 'a.0.weight'"),
    "swap the owner of an objective": (
        _swap_objective_owner,
        "of 'c' reaches parameter 'b.0.weight', which 'b' owns",
    ),
    "swap the owner of a layer": (
        _swap_forward_owner,
        "'b.loss' of 'b' reaches parameter 'b.0.weight', which 'c' owns",
    ),
    "two owners of one layer": (_two_owners, "parameter 'a.0.weight' has 2 owners: 'a', 'b'"),
}
LIVE = [
    "drop a stop_gradient",
    "identity for stop_gradient",
    "merge two objectives",
    "reroute an edge",
    "straight-through",
]


@pytest.mark.parametrize("name", GRAPHS)
def test_reachability_names_the_leak(name: str) -> None:
    mutate, text = GRAPHS[name]
    program = bare_program()
    mutate(program.ir)
    with pytest.raises(locc.LocalityError) as caught:
        locc.verify(program)
    assert text in str(caught.value)
    assert {f.check for f in caught.value.findings} == {REACHABILITY}


def test_the_path_runs_from_the_objective_to_the_parameter() -> None:
    program = bare_program()
    _drop_stop_gradient(program.ir)
    finding = next(f for f in static.check(program.ir) if f.tensor == "a.0.weight")
    assert finding.path[0].startswith(_objective(program.ir, "b").name)
    assert finding.path[-1].startswith("a of 'a'")


@pytest.mark.parametrize("name", LIVE)
def test_the_walk_and_the_sentinel_see_it_independently(name: str) -> None:
    program = bare_program()
    ir = program.ir
    GRAPHS[name][0](ir)
    batch = small_batch(ir, ir.captured.example)
    walked = walk.check(ir, batch).findings
    assert any(f.tensor == "a.0.weight" and "'b.loss' of 'b'" in f.text and f.check == WALK for f in walked)
    run = sentinel.check(ir, program.optimizers, batch).findings
    assert any(f.tensor == "a.0.weight" and "'b.loss' of 'b'" in f.text and f.check == SENTINEL for f in run)


def test_a_live_value_in_the_place_of_a_gradient_value() -> None:
    program = bare_program("bp")
    ir = program.ir
    gradient = next(n for n in ir.gradients() if n.meta["owner"] == "c")
    gradient.replace_all_uses_with(gradient.args[1])
    entry = next(
        n for n in ir.nodes("b") if n.target is ops.stop_gradient and gradient.args[1] in n.all_input_nodes
    )
    entry.target = torch.clone
    with pytest.raises(
        locc.LocalityError, match=r"'grad_b_at_c_at_b' of 'b' reads the live value 'b_at_c' of 'c'"
    ):
        locc.verify(program)


def test_a_gradient_with_respect_to_a_foreign_leaf() -> None:
    program = bare_program("bp")
    gradient = next(n for n in program.ir.gradients() if n.meta["owner"] == "c")
    gradient.args = (gradient.args[0], _boundary(program.ir, "b"))
    with pytest.raises(
        locc.LocalityError, match=r"gradient 'grad_\w+' mixes modules: .* with respect to 'a_at_b' of 'b'"
    ):
        locc.verify(program)


def test_an_assignment_to_a_foreign_parameter() -> None:
    program = bare_program()
    ir = program.ir
    with ir.graph.inserting_before(_objective(ir, "b")):
        state = ir.graph.get_attr("model.a.0.weight")
        node = ir.graph.call_function(ops.assign, (state, state))
    state.meta.update(owner="a", role="state", made_by="mutant", spec=None)
    node.meta.update(owner="b", role="assign", made_by="mutant", spec=None)
    with pytest.raises(locc.LocalityError, match=r"'b' assigns 'a\.0\.weight', which is no state of its own"):
        locc.verify(program)


def test_an_in_place_operation_on_a_boundary_value() -> None:
    """`stop_gradient` shares memory: the producer's value changes with the consumer's."""
    program = bare_program()
    ir = program.ir
    entry = _boundary(ir, "b")
    with ir.graph.inserting_after(entry):
        node = ir.graph.call_function(torch.Tensor.add_, (entry, 1.0))
    node.meta.update(owner="b", role="forward", made_by="mutant", spec=entry.meta["spec"])
    entry.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    with pytest.raises(
        locc.LocalityError, match=r"forward of 'b' changes 'a', a value of 'a', in place.*sentinel run"
    ):
        locc.verify(program)
