from __future__ import annotations

import pytest
import torch
from torch import nn

import locc
import support
from locc.errors import GraphError
from locc.ir import Repeat, carry, ops
from locc.ir.invariants import check
from rules import Rule, finish, mean_square, repeat, sent


@pytest.fixture
def ir():
    return support.compiled(support.mlp(), "bp", ["first", "second"]).ir


def _refused(ir, text):
    with pytest.raises(GraphError, match=text) as error:
        check(ir, "sabotage")
    assert "after 'sabotage'" in str(error.value)


def test_a_compiled_graph_is_valid(ir):
    check(ir, "nothing")


def test_a_live_edge_between_owners_is_found(ir):
    (boundary,) = ir.boundaries(producer="first")
    boundary.entry.replace_all_uses_with(boundary.value)
    _refused(ir, r"'\w+' of 'second' reads 'first' of 'first' without stop_gradient")


def test_a_parameter_with_two_owners_is_found(ir):
    node = ir.emit("third", torch.relu, ir.read("third", "model.first.weight"))
    assert node.meta["owner"] == "third"
    _refused(ir, "parameter 'first.weight' has two owners")


def test_a_frozen_parameter_may_be_shared(ir):
    ir.root.model.first.weight.requires_grad_(False)
    ir.emit("third", torch.relu, ir.read("third", "model.first.weight"))
    check(ir, "sharing a constant")


def test_a_node_without_owner_is_found(ir):
    ir.nodes("second")[0].meta["owner"] = "nobody"
    _refused(ir, "has no owner")


def test_a_gradient_between_owners_is_found(ir):
    entry = ir.boundaries(producer="first")[0].entry
    ir.gradients()[0].args = (ir.loss, entry)
    _refused(ir, "mixes owners")


def test_a_gradient_with_respect_to_a_parameter_is_found(ir):
    ir.gradients()[0].args = (ir.loss, ir.read("third", "model.third.weight"))
    _refused(ir, "is taken with respect to '.*third_weight', which is no value of the step")


def test_assigning_to_a_foreign_state_is_found(ir):
    foreign = ir.read("first", "model.first.bias")
    ir.emit("second", ops.assign, foreign, ir.stop_gradient("second", foreign))
    _refused(ir, "not a state of 'second'")


def test_a_scalar_that_is_two_objectives_is_found(ir):
    ir.objective("third", ir.loss, "again")
    _refused(ir, r"'loss' is the objective 'third\.loss' and 'third\.again' as well; scale it instead")


def test_reading_the_entry_of_a_region_outside_is_found():
    ir = support.compiled(support.mlp(), "altmin", ["first", "second"]).ir
    region = next(iter(ir.repeats.values()))
    entry = region.carried[0][0]
    outside = ir.emit(entry.meta["owner"], torch.relu, entry)
    _refused(
        ir, f"'{outside.name}' reads '{entry.name}', which has no value outside of region '{region.name}'"
    )


# ---- writes ---------------------------------------------------------------------------------------


class Aliased(nn.Module):
    """Two layers, a buffer of each, and one that both have registered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        for layer in (self.first, self.second):
            layer.register_buffer("own", torch.zeros(2))
        self.second.register_buffer("shared", torch.ones(2))
        self.first.register_buffer("shared", self.second.shared)

    def forward(self, x):
        return self.second(self.first(x))


def writing(rewrite) -> None:
    support.compiled(Aliased(), Rule(lambda ir: (finish(ir), rewrite(ir))), ["first"])


def test_a_state_is_assigned_once_under_whatever_path():
    def twice(ir):
        ir.assign("first", "model.first.shared", ir.emit("first", torch.ones, 2))
        ir.assign("second", "model.second.shared", ir.emit("second", torch.ones, 2))

    with pytest.raises(
        GraphError, match=r"'second\.shared' is assigned twice, by 'assign_of_first' and 'assign_of_second'"
    ):
        writing(twice)


def test_two_parts_of_one_storage_may_both_be_assigned():
    def both(ir):
        flat = torch.zeros(4)
        for layer, part in ((ir.root.model.first, flat[:2]), (ir.root.model.second, flat[2:])):
            layer.own = part
        for owner in ("first", "second"):
            ir.assign(owner, f"model.{owner}.own", ir.emit(owner, torch.ones, 2))

    writing(both)


def test_another_owner_reads_what_is_assigned_through_a_stop_gradient():
    def foreign(ir):
        ir.assign("first", "model.first.shared", ir.emit("first", torch.ones, 2))
        ir.emit("second", torch.neg, ir.read("second", "model.second.shared"))

    with pytest.raises(
        GraphError, match=r"'first\.shared' is assigned by 'first', and '.*' of 'second' reads it"
    ):
        writing(foreign)


def test_what_a_round_assigns_is_read_in_that_region_alone():
    def region(ir):
        before = set(ir.graph.nodes)
        ir.assign("first", "model.first.weight", ir.emit("first", torch.ones, 6, 4))
        repeat(ir, "rounds", before)
        ir.repeats["rounds"] = Repeat("rounds", 2, ())

    with pytest.raises(GraphError, match="each round of region 'rounds', and 'first' reads it outside"):
        writing(region)


def test_a_region_carries_its_own_values_to_their_own_owner():
    def region(ir):
        with ir.repeat("rounds", 2) as carried:
            code = ir.emit("first", carry, sent(ir, "first"))
            carried.append((code, ir.emit("second", torch.neg, ir.stop_gradient("second", code))))

    with pytest.raises(GraphError, match=r"'rounds' carries '\w+' of 'second' into '\w+' of 'first'; carry"):
        writing(region)


# ---- objectives -----------------------------------------------------------------------------------


def only_the_input(ir):
    first = ir.modules[0].name
    ir.objective(first, ir.emit(first, mean_square, ir.inputs[0]), "size")


def cut_off(ir):
    first = ir.modules[0].name
    ir.objective(first, ir.emit(first, mean_square, ir.stop_gradient(first, sent(ir, first), "cut")), "size")


def by_whole_numbers(ir):
    first = ir.modules[0].name
    best = ir.emit(first, torch.argmax, sent(ir, first), 1)
    ir.objective(first, ir.emit(first, torch.mean, ir.emit(first, torch.Tensor.float, best)), "size")


def by_way_of_a_region(ir):
    first = ir.modules[0].name
    with ir.repeat("rounds", 2) as carried:
        code = ir.emit(first, carry, sent(ir, first))
        carried.append((code, ir.emit(first, torch.neg, code)))
    ir.objective(first, ir.emit(first, mean_square, carried[0][1]), "size")


@pytest.mark.parametrize("rewrite", [only_the_input, cut_off, by_whole_numbers, by_way_of_a_region])
def test_an_objective_that_reaches_no_parameter_is_refused_in_one_sentence(rewrite):
    with pytest.raises(
        GraphError, match=r"objective 'first\.size' reaches no parameter of 'first'; compute"
    ) as e:
        support.compiled(support.mlp(), Rule(lambda ir: (rewrite(ir), finish(ir, "first"))), ["first"])
    assert str(e.value).count(";") == 1


def judged(ir):
    """An auxiliary that never learns has an objective of its own."""
    judge = ir.add_owner("first.judge", ir.modules[0]).name
    path = ir.add_module(judge, nn.Linear(8, 3).requires_grad_(False))
    opinion = ir.call(judge, path, ir.stop_gradient(judge, sent(ir, "first")))
    ir.objective(judge, ir.emit(judge, mean_square, opinion), "opinion")


def test_an_owner_that_cannot_learn_may_have_an_objective_all_the_same():
    program = support.compiled(support.mlp(), Rule(lambda ir: (judged(ir), finish(ir))), ["first"])
    assert float(program.step(*support.batch()).objectives["first.judge.opinion"]) > 0

    tokens = torch.randint(11, (3, 4))
    options = {"tied": "owner", "loss": of_tokens}
    borrower = locc.compile(support.Tied(), Rule(finish), ["mid"], example_inputs=tokens, **options)
    assert not borrower.ir.parameters("head")
    assert float(borrower.step(tokens, tokens).objectives["head.loss"]) > 0


def of_tokens(scores, tokens):
    return nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten())


# ---- the rest -------------------------------------------------------------------------------------


def test_a_cycle_is_found(ir):
    first = next(n for n in ir.nodes("first") if n.op == "call_module")
    gradient = ir.gradients()[-1]
    first.args = (gradient,)
    _refused(ir, "no valid order")


def test_a_changed_inference_path_is_found(ir):
    ir.root.model.add_module("extra", nn.Tanh())
    node = next(n for n in ir.nodes("third") if n.target == "model.relu2")
    node.target = "model.extra"
    _refused(ir, "no longer computes the captured model")


def test_a_changed_eval_graph_is_found(ir):
    node = next(n for n in ir.inference.nodes if n.target == "model.relu2")
    node.target = "model.relu1"
    _refused(ir, "no longer computes the captured model")


def test_a_folding_method_may_change_it(ir):
    ir.root.model.add_module("extra", nn.Tanh())
    next(n for n in ir.nodes("third") if n.target == "model.relu2").target = "model.extra"
    ir.folded = True
    check(ir, "folding")
