"""backend="inductor": the same training, compiled; what cannot be compiled is named."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import locc
from locc import LoccError, Program, RunError
from locc.ir import TrainingGraph
from locc.runtime.backends import AotEager
from locc.runtime.compiled import careful
from rules import Rule, finish, mean_square
from support import batch, compiled, mlp, same, sgd, snapshot, usual_case

X, Y = batch()
FAST = ("bp", "infopro")
"""Leaves, gradients as values, and a tape that serves two backward passes; `dgl` is in the tests below."""


def trained(model: nn.Module, backend: str, sizes: tuple[int, ...] = (5, 5, 5), **given: Any) -> Program:
    program = compiled(
        model, given.pop("method", "dgl"), given.pop("splits", 2), backend=backend, verify=False, **given
    )
    for size in sizes:
        program.step(X[:size], Y[:size])
    return program


def twins(make: Any, **given: Any) -> tuple[Program, Program]:
    """The program on eager operators, and the compiled one, after the same steps."""
    found = []
    for backend in ("eager", "aot_eager"):
        torch.manual_seed(0)
        found.append(trained(make(), backend, **given))
    return found[0], found[1]


@pytest.mark.parametrize(
    "method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in sorted(locc.methods())]
)
def test_compiled_code_trains_the_same_bits(method):
    case = usual_case(method)
    found = []
    for backend in ("eager", "aot_eager"):
        program = case.compile(backend=backend, verify=False)
        reports = [program.step(*case.batch(i)) for i in range(3)]
        found.append(
            (snapshot(program), [float(report.loss) for report in reports if report.loss is not None])
        )
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    eager = [line for piece in program.backend_report.eager for line in piece.text if "output_step" in line]
    assert len(program.backend_report.eager) == len(eager)  # a loop until nothing moves, of `dladmm`
    assert len(program.backend_report.modules) >= len(program.ir.modules)


def test_each_of_several_dropouts_draws_from_its_own_stream():
    def make() -> nn.Module:
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)), nn.Linear(4, 3)
        )

    eager, other = twins(make, splits=["2"])
    assert same(snapshot(eager), snapshot(other))
    assert not other.backend_report.eager


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.a(x) + self.b(x)


def test_code_that_one_of_two_backward_passes_needs_is_compiled_by_itself():
    def two(ir: TrainingGraph) -> None:
        for node in [n for n in ir.graph.nodes if n.target in ("model.a", "model.b")]:
            ir.objective("output", ir.emit("output", mean_square, node), node.name)
        finish(ir, "output")

    eager, other = twins(Parallel, method=Rule(two), splits=["stem"])
    assert len(eager.ir.objectives("output")) == 2
    assert same(snapshot(eager), snapshot(other))
    assert not other.backend_report.eager


class Scaled(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.linear(x))) * self.factor


@pytest.mark.parametrize(
    ("factors", "limit", "graphs"),
    [
        ((2, 2, 2, 2), 8, 2),  # the first reads the data, and no value that is cut from its tape
        ((2, 2, 3, 3), 8, 3),
        ((2, 2, 3, 3), 1, 4),  # nothing but guards tells 2 from 3, and the shared code holds no more
    ],
)
def test_modules_of_one_structure_share_a_compilation(factors, limit, graphs):
    def make() -> nn.Module:
        return nn.Sequential(*map(Scaled, factors), nn.Linear(4, 3))

    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=limit):
        eager, other = twins(make, splits=["0", "1", "2", "3"])
    assert same(snapshot(eager), snapshot(other))
    assert counters["stats"]["unique_graphs"] - before == graphs + 1  # and the output's
    assert len(other.backend_report.pieces) == 5
    assert not other.backend_report.eager


def test_a_last_batch_of_another_size_is_compiled_for_every_size():
    eager, other = twins(mlp, sizes=(5, 3))
    graphs = counters["stats"]["unique_graphs"]
    for program in (eager, other):
        program.step(X[:4], Y[:4])
        program.step(X[:2], Y[:2])
    assert counters["stats"]["unique_graphs"] == graphs
    assert same(snapshot(eager), snapshot(other))
    assert not other.backend_report.eager


def test_a_wave_of_compiled_modules_trains_the_same_bits():
    eager, other = twins(lambda: mlp(0.5), sizes=())
    for program in (eager, other):
        program.wave([(X, Y), (X.flip(0), Y.flip(0))])
    assert same(snapshot(eager), snapshot(other))
    assert other.backend_report.pieces
    assert not other.backend_report.eager


class Broken(nn.Module):
    """A layer that no compiler takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    @torch.compiler.disable
    def inner(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def broken() -> nn.Module:
    model = mlp()
    model.second = Broken()
    return model


def test_what_cannot_be_compiled_runs_eagerly_and_is_named(caplog):
    eager, other = twins(broken, splits=["first", "second"])
    assert same(snapshot(eager), snapshot(other))
    (piece,) = other.backend_report.eager
    assert piece.module == "second"
    assert "torch.compiler.disable" in piece.reason
    assert [r.message for r in caplog.records if "in module 'second'" in r.message and "eagerly" in r.message]
    text = str(other.backend_report)
    assert "first: 1 compiled, 0 eager" in text
    assert "second: 0 compiled, 1 eager" in text
    assert str(eager.backend_report) == "backend 'eager': nothing is compiled"


def test_strict_refuses_it_and_undoes_the_step():
    program = trained(broken(), "aot_eager", (), splits=["first", "second"], strict=True)
    before = snapshot(program)
    with pytest.raises(
        RunError, match=r"module 'second' cannot be compiled, in the piece of .*: .*Leave out strict=True"
    ):
        program.step(X, Y)
    assert same(before, snapshot(program))


def test_strict_is_of_a_backend_that_compiles():
    with pytest.raises(LoccError, match="backend='eager' compiles none; use backend='inductor'"):
        compiled(mlp(), strict=True)


class Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 4 and self.training:
            raise ValueError("four samples")
        return x


def test_what_is_wrong_with_a_batch_is_no_reason_to_stay_eager():
    model = mlp()
    model.relu2 = Picky()
    program = trained(model, "aot_eager", (5,))
    with pytest.raises(RunError, match="ValueError: four samples"):
        program.step(X[:4], Y[:4])
    program.step(X, Y)
    assert not program.backend_report.eager


def test_a_hook_that_comes_later_runs():
    seen: list[int] = []
    eager, other = twins(mlp, sizes=(5,))
    for program in (eager, other):
        program.model.second.register_forward_hook(lambda module, x, y: seen.append(1) or y * 2)
        program.step(X, Y)
    assert same(snapshot(eager), snapshot(other))
    assert len(seen) == 2


class Counting(nn.Module):
    """Code that differs in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = "."

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += "."
        return x * len(self.calls)


def test_code_that_is_compiled_too_often_becomes_eager_and_says_so():
    def make() -> nn.Module:
        model = mlp()
        model.relu2 = Counting()
        return model

    with torch._dynamo.config.patch(recompile_limit=1):
        eager, other = twins(make)
    assert same(snapshot(eager), snapshot(other))
    (piece,) = other.backend_report.eager
    assert "recompile_limit" in piece.reason


def conv() -> nn.Module:
    blocks = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (1, 8, 8)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 3))
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Upsample(4), *blocks, head)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize(
    ("make", "method", "dtype", "tolerance"),
    [
        (lambda: mlp(0.5), "bp", torch.float32, 1e-5),
        (conv, "dgl", torch.float64, 1e-10),  # few samples in BatchNorm: rounding grows with each step
    ],
    ids=["mlp", "conv"],
)
def test_inductor_trains_the_same_up_to_rounding(make, method, dtype, tolerance):
    found = []
    x = X.to(dtype)
    for backend in ("eager", "inductor"):
        torch.manual_seed(0)
        program = compiled(make().to(dtype), method, 2, backend=backend, optimizer=sgd(), seed=0)
        for size in (5, 5, 3):
            program.step(x[:size], Y[:size])
        found.append(snapshot(program))
    assert not program.backend_report.eager
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance / 10)


def test_within_a_dispatch_mode_code_runs_eagerly_and_once():
    for strict in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)]
        program = trained(nn.Sequential(*layers), "aot_eager", (), splits=["1"], strict=strict)
        with FlopCounterMode(display=False):
            if strict:
                with pytest.raises(RunError, match=r"module '[01]' .* within a TorchDispatchMode"):
                    program.step(X, Y)
                continue
            program.step(X, Y)
        assert layers[1].num_batches_tracked == 1
        program.step(X, Y)
        assert not program.backend_report.eager
        assert len(program.backend_report.modules) == 2


@pytest.mark.parametrize(("method", "once"), [("dgl", True), ("infopro", False)])
def test_a_backward_pass_writes_into_what_is_kept_for_it_where_no_other_needs_that(method, once):
    program = usual_case(method).compile()
    with careful(program.plan()):
        assert torch._functorch.config.donated_buffer is once


def test_the_sign_of_what_is_handed_on_is_not_kept_for_the_backward_pass(monkeypatch):
    # What inductor keeps, without its C++ compiler.
    monkeypatch.setattr(AotEager, "compiler", "aot_eager_decomp_partition")
    kept: list[Tensor] = []
    parts = [nn.Sequential(nn.Linear(4, 64), nn.ReLU()), nn.Sequential(nn.Linear(64, 64), nn.ReLU())]
    program = trained(nn.Sequential(*parts, nn.Linear(64, 3)), "aot_eager", head=_averaged)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        program.step(X[:5], Y[:5])
    assert not program.backend_report.eager
    assert [t.shape for t in kept if t.dtype == torch.float32 and t.shape == (5, 64)]
    assert not [t.shape for t in kept if t.dtype == torch.bool and t.shape == (5, 64)]


def _averaged(boundary: Any, output: Any) -> nn.Module:
    """A head that is linear in its input's mean, and keeps no input for its backward pass."""
    return nn.Sequential(nn.Unflatten(1, (16, 4)), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 3))
