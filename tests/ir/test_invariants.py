from __future__ import annotations

import pytest
import torch
from torch import nn

import support
from locc.errors import GraphError
from locc.ir import ops
from locc.ir.invariants import check


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


def test_a_gradient_with_respect_to_a_computed_value_is_found(ir):
    relu = next(n for n in ir.nodes("third") if n.target == "model.relu2")
    ir.gradient(ir.loss, relu)
    _refused(ir, "which is not a leaf")


def test_a_gradient_with_respect_to_a_parameter_is_found(ir):
    ir.gradient(ir.loss, ir.read("third", "model.third.weight"))
    _refused(ir, "which is not a leaf")


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
