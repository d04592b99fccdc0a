"""`repeat`: what belongs to a region, and what does not."""

from __future__ import annotations

import pytest
import torch

import support
from locc.errors import GraphError
from locc.ir import Repeat, carry
from locc.ir.invariants import check


def test_a_region_holds_what_is_emitted_inside() -> None:
    ir = support.compiled(support.mlp(), "dgl", ["first"]).ir
    start = ir.stop_gradient("first", ir.prediction, role="start")
    with ir.repeat("inner", 3) as carried:
        z = ir.emit("first", carry, start)
        scale = ir.read("first", "model.first.bias")
        moved = ir.emit("first", torch.add, z, 1.0)
        carried.append((z, moved))
    after = ir.emit("first", torch.neg, moved)
    assert ir.repeats == {"inner": Repeat("inner", 3, ((z, moved),))}
    assert [n for n in ir.graph.nodes if n.meta.get("repeat") == "inner"] == [z, moved]
    assert all("repeat" not in n.meta for n in (start, scale, after))
    check(ir, "repeat")


@pytest.mark.parametrize(("name", "times"), [("inner", 2), ("other", 0)])
def test_a_region_needs_a_name_of_its_own_and_a_round(name: str, times: int) -> None:
    ir = support.compiled(support.mlp(), "dgl", ["first"]).ir
    with ir.repeat("inner", 1):
        pass
    with pytest.raises(GraphError, match=f"region '{name}', {times} times"), ir.repeat(name, times):
        pass
