"""`feed`: what takes the place of a value in training, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import support
from locc.errors import GraphError
from locc.ir import TensorSpec, TrainingGraph
from locc.ir.invariants import check


@pytest.fixture
def ir() -> TrainingGraph:
    return support.compiled(support.mlp(), "dgl", ["first", "second"]).ir


def _state(ir: TrainingGraph, owner: str, like: torch.fx.Node) -> torch.fx.Node:
    return ir.state(owner, "kept", like.meta["spec"])


def test_the_owner_reads_the_new_value_but_for_what_that_is_made_of(ir: TrainingGraph) -> None:
    (boundary,) = ir.boundaries(consumer="second")
    (reader,) = boundary.entry.users
    mixed = ir.emit("second", torch.add, _state(ir, "second", boundary.entry), boundary.entry)
    ir.feed("second", boundary.entry, mixed)
    assert reader.args == (mixed,)
    assert boundary.entry in mixed.all_input_nodes
    later = ir.emit("second", torch.neg, boundary.entry)
    assert later.args == (boundary.entry,)
    check(ir, "feed")


def test_an_input_is_fed_to_one_owner() -> None:
    model = TwoReaders()
    x = torch.randn(3, 4)
    ir = support.compiled(model, "dgl", ["one"], example_inputs=x).ir
    (first, second), (given,) = ir.modules, ir.inputs
    ir.feed(second.name, given, _state(ir, second.name, given))
    assert {str(user.meta["owner"]) for user in given.users} == {first.name}
    check(ir, "feed")


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x) + x)


def test_the_same_without_feed_is_another_model(ir: TrainingGraph) -> None:
    (boundary,) = ir.boundaries(consumer="second")
    boundary.entry.replace_all_uses_with(_state(ir, "second", boundary.entry))
    with pytest.raises(GraphError, match="no longer computes the captured model"):
        check(ir, "sabotage")


def test_what_cannot_be_fed_is_refused(ir: TrainingGraph) -> None:
    (boundary,) = ir.boundaries(consumer="second")
    entry = boundary.entry
    foreign = _state(ir, "first", entry)
    narrow = ir.state("second", "narrow", TensorSpec((2,), torch.float32))
    (hidden,) = entry.users
    for old, new in (
        (entry, foreign),
        (entry, narrow),
        (entry, hidden),
        (hidden, _state(ir, "second", hidden)),
    ):
        with pytest.raises(GraphError, match=r"feed a value that a pass has emitted for the owner"):
            ir.feed("second", old, new)
