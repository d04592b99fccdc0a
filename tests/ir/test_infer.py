"""What is inferred of an emitted operation: shape, dtype, whether it draws, contracts, and views."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from locc.errors import GraphError
from locc.ir import BatchDim, TensorSpec, TrainingGraph
from locc.ir.spec import map_specs
from support import batch, compiled, mlp

LAST = "output"


@pytest.fixture(scope="module")
def ir() -> TrainingGraph:
    return compiled(mlp(), "bp", ["first"], verify=False).ir


def entry(ir: TrainingGraph) -> fx.Node:
    return ir.boundaries()[0].entry


def spec_of(node: fx.Node) -> Any:
    return map_specs(str, node.meta["spec"])


# ---- shapes and dtypes ---------------------------------------------------------------------------

H = object()
"""Stands for a value f32[B,8]."""


def pairs(h: Tensor) -> Tensor:
    return (h @ h.T).flatten()


def positive(h: Tensor) -> Tensor:
    return h[h > 0]


def by_value(h: Tensor) -> Tensor:
    return h.new_zeros(int(h.sum()) + 1)


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (torch.cat, ([H, H],), "f32[2*B,8]"),
        (functional.pad, (H, (0, 0, 1, 0)), "f32[B+1,8]"),
        (torch.diff, (H, 1, 0), "f32[B-1,8]"),
        (torch.flatten, (H,), "f32[8*B]"),
        (torch.Tensor.double, (H,), "f64[B,8]"),
        (torch.sum, (H,), "f32[]"),
        (torch.argmax, (H, 1), "i64[B]"),
        (torch.gt, (H, 0), "bool[B,8]"),
        (torch.max, (H, 1), ("f32[B]", "i64[B]")),
        (torch.chunk, (H, 2, 1), ("f32[B,4]", "f32[B,4]")),
        (torch.linalg.inv, (H,), None),
        (torch.unbind, (H,), None),
        (pairs, (H,), None),
        (positive, (H,), None),
        (by_value, (H,), None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_spec_is_that_of_the_result(ir, function, args, expected):
    given = fx.node.map_aggregate(args, lambda a: entry(ir) if a is H else a)
    assert spec_of(ir.emit(LAST, function, *given)) == expected


def test_a_value_too_large_to_try_has_a_spec_all_the_same(ir):
    seen: list[type] = []

    def square(h: Tensor) -> Tensor:
        seen.append(type(h))
        return h.square()

    wide = ir.emit(LAST, torch.Tensor.expand, ir.emit(LAST, torch.unsqueeze, entry(ir), 2), -1, -1, 2**22)
    assert spec_of(ir.emit(LAST, square, wide)) == "f32[B,8,4194304]"
    assert set(seen) == {FakeTensor}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["dtp", "cdni", "altmin", "predsim"])
def test_a_step_finds_every_value_as_its_spec_says(method, dtype):
    """Whatever the dtype of the model: none of its scalars is taken for float32."""
    program = compiled(mlp().to(dtype), method, ["first", "second"], verify=False)
    seen: set[str] = set()

    def look(instruction: Any, values: dict[str, Any]) -> None:
        for name in instruction.writes:
            spec = program.plan().specs[name]
            if isinstance(spec, TensorSpec):
                seen.add(name)
                assert tuple(values[name].shape) == spec.concrete(5), name
                assert values[name].dtype == spec.dtype, name

    program.built.executor.observe = look
    program.step(*batch(5, dtype))
    assert {n.args[0].name for n in program.ir.objectives()} <= seen


# ---- what else is seen ---------------------------------------------------------------------------


def noisy(h: Tensor) -> Tensor:
    return h + torch.randn_like(h)


def first_rows(h: Tensor) -> Tensor:
    return h[h.argmax(0)]  # numbers pick as many rows as there are numbers


@pytest.mark.parametrize(
    ("function", "args", "marks"),
    [
        (noisy, (H,), {"random"}),
        (functional.dropout, (H, 0.5), {"random"}),
        (torch.neg, (H,), set()),
        (torch.t, (H,), {"views"}),
        (operator.getitem, (H, 0), {"views"}),
        (torch.chunk, (H, 2, 1), {"views"}),
        (torch.clone, (H,), set()),
        (functional.linear, (H, H), {"contracts"}),
        (torch.einsum, ("bi,bj->ij", H, H), {"contracts"}),
        (torch.linalg.pinv, (H,), {"contracts"}),
        (torch.linalg.vector_norm, (H,), set()),
        (functional.cosine_similarity, (H, H), set()),
        (functional.scaled_dot_product_attention, (H, H, H), {"contracts"}),
        (positive, (H,), {"untried"}),
        (first_rows, (H,), set()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_function_does_is_marked(ir, function, args, marks):
    """What cannot be tried says so: it may draw."""
    given = fx.node.map_aggregate(args, lambda a: entry(ir) if a is H else a)
    meta = ir.emit(LAST, function, *given).meta
    assert {name for name in ("random", "untried", "contracts", "views") if meta.get(name)} == marks


class Counts(nn.Module):
    """Counts its calls, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(functional.dropout(h))


def run(module: nn.Module, h: Tensor) -> Tensor:
    return module(h)


def test_a_trial_leaves_no_trace(ir):
    path = ir.add_module("counts", Counts())
    before = {name: value.clone() for name, value in ir.root.state_dict().items()}
    generator = torch.get_rng_state()
    for node in (
        ir.call(LAST, path, entry(ir)),
        ir.emit(LAST, run, ir.read(LAST, path, role="module"), entry(ir)),
        ir.emit(LAST, torch.Tensor.add_, ir.read(LAST, f"{path}.calls"), 1),
    ):
        assert node.meta["spec"] is not None
    assert torch.equal(torch.get_rng_state(), generator)
    after = ir.root.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# ---- what is tried once, and for what is alike ---------------------------------------------------


class Wide(nn.Module):
    """Repeats its input, as often as a setting says."""

    def __init__(self, times: Any) -> None:
        super().__init__()
        self.times = times

    def forward(self, h: Tensor) -> Tensor:
        return h.repeat(1, self.times if isinstance(self.times, int) else len(self.times))


@pytest.mark.parametrize("times", [int, lambda n: [0] * n, lambda n: (0,) * n, torch.zeros], ids=range(4))
def test_modules_that_differ_in_a_setting_are_not_taken_for_alike(ir, times):
    for n in (1, 2, 3):
        path = ir.add_module("wide", Wide(times(n)))
        assert spec_of(ir.call(LAST, path, entry(ir))) == f"f32[B,{8 * n}]"


def test_arguments_that_are_equal_but_of_another_type_are_not_taken_for_alike(ir):
    best = ir.emit(LAST, torch.argmax, entry(ir), 1)
    assert [spec_of(ir.emit(LAST, torch.mul, best, by)) for by in (1, 1.0)] == ["i64[B]", "f32[B]"]


def test_sizes_are_those_of_the_value(ir):
    shape = ir.emit(LAST, getattr, entry(ir), "shape")
    sizes = [ir.emit(LAST, operator.getitem, shape, i) for i in (0, 1)]
    half = ir.emit(LAST, operator.floordiv, sizes[1], 2)
    found = [spec_of(ir.emit(LAST, torch.Tensor.new_ones, entry(ir), (n, 2))) for n in (*sizes, half)]
    assert found == ["f32[B,2]", "f32[8,2]", "f32[4,2]"]


def test_a_hook_may_decide_the_result(ir):
    plain, hooked = nn.Linear(8, 8), nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *args: args[-1][:, :2])
    found = [spec_of(ir.call(LAST, ir.add_module("hooked", m), entry(ir))) for m in (plain, hooked)]
    assert found == ["f32[B,8]", "f32[B,2]"]


def test_layers_that_are_alike_are_tried_once(ir):
    tried: list[int] = []

    class Layer(nn.Linear):
        def forward(self, h: Tensor) -> Tensor:
            tried.append(len(h))
            return super().forward(h)

    for _ in range(5):
        ir.call(LAST, ir.add_module("layer", Layer(8, 8)), entry(ir))
    assert len(tried) == 2


# ---- a spec that is given ------------------------------------------------------------------------


def test_a_spec_that_is_given_is_a_check(ir):
    right = TensorSpec((BatchDim(), 8), torch.float32)
    assert ir.emit(LAST, torch.neg, entry(ir), spec=right).meta["spec"] == right
    wrong = replace(right, dtype=torch.float64)
    text = (
        r"pass 'partition' says that 'neg' of 'output' gives f64\[B,8\], and it gives f32\[B,8\]; leave spec="
    )
    with pytest.raises(GraphError, match=text):
        ir.emit(LAST, torch.neg, entry(ir), spec=wrong)


def test_it_stands_in_where_nothing_can_be_inferred(ir):
    spec = TensorSpec((), torch.float32)
    loss = ir.emit(LAST, functional.cross_entropy, ir.output, ir.target, spec=spec)
    assert loss.meta["spec"] == ir.emit(LAST, by_value, entry(ir), spec=spec).meta["spec"] == spec
    assert ir.emit(LAST, torch.neg, loss).meta["spec"] == spec
    unknown = ir.emit(LAST, functional.cross_entropy, ir.output, ir.target)
    assert unknown.meta["spec"] is None
