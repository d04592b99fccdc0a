from __future__ import annotations

from torch import nn

import support
from locc.ir.tape import changers, tape_of


class InPlace(nn.Module):
    """Changes a slice in place, with a weight, and drops the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        h[:, :2].mul_(self.scale(x))
        return self.last(h)


def test_a_tape_ends_at_a_boundary():
    ir = support.compiled(support.mlp(), "bp", ["first"]).ir
    tape = tape_of(ir.loss)
    assert {n.meta["owner"] for n in tape if n.op != "placeholder"} == {"output"}
    assert ir.boundaries()[0].entry in tape


def test_a_change_in_place_belongs_to_the_tape_of_what_it_changes():
    ir = support.compiled(InPlace(), "bp", ["first"]).ir
    scale = next(n for n in ir.graph.nodes if n.target == "model.scale")
    assert scale in tape_of(ir.loss)
    assert scale not in tape_of(ir.loss, {})
    assert changers(ir.graph)


def test_auxiliaries_of_names_that_differ_in_a_dot_are_kept_apart():
    ir = support.compiled(support.mlp(), "bp", ["first"]).ir
    one, other = ir.add_module("a.b_c", nn.Linear(1, 1)), ir.add_module("a_b.c", nn.Linear(1, 1))
    assert one != other
    assert ir.root.get_submodule(one) is not ir.root.get_submodule(other)
