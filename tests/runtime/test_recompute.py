"""recompute=: the same training, with less kept between the forward and the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.meter import peak
from locc import LoccError
from support import compiled, same, snapshot


class Block(nn.Module):
    """Statistics, dropout, an early result kept for later, and a table that its own forward moves."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.BatchNorm1d(4 * width), nn.Tanh())
        self.outer = nn.Sequential(nn.Dropout(0.5), nn.Linear(4 * width, width), nn.BatchNorm1d(width))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.tanh(x + self.calls * self.outer(self.inner(x)))


def blocks(count: int = 2, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(count)), nn.Linear(width, 3))


def batch(step: int, size: int = 6, width: int = 8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, width, generator=generator), torch.randint(3, (size,), generator=generator)


X = batch(0)[0]
ASKED = [False, True, ["0", "?.inner", "1.outer"]]
"""The last one has a submodule within another."""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dgl", {"schedule": "sequential", "update": "in_backward"}),
        ("infopro", {"autocast": "bfloat16"}),  # two backward passes through one tape
    ],
)
def test_the_same_bits_are_trained(method, options):
    found = []
    for asked in ASKED:
        program = compiled(
            blocks(), method, ["0"], recompute=asked, seed=0, example_inputs=X, verify=False, **options
        )
        reports = [program.step(*batch(i)) for i in range(3)]
        found.append((snapshot(program), [float(report.loss) for report in reports]))
        assert all("forward" not in module.__dict__ for module in program.modules())
    (first, losses), *others = found
    for other, again in others:
        assert same(first, other)
        assert losses == again


def test_what_is_inside_is_not_kept():
    def most(recompute) -> int:
        model = nn.Sequential(*(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))) for _ in range(4)))
        x, y = torch.randn(512, 16), torch.randint(16, (512,))
        program = compiled(model, "bp", ["1"], recompute=recompute, example_inputs=x[:2], verify=False)
        program.step(x, y)
        return peak(lambda: program.step(x, y), program.parameters()).total

    value = 4 * 512 * 16
    assert most(False) > 16 * value
    assert most(True) < 12 * value


class Watched(Block):
    """Counts its runs and can fail in one of them."""

    runs, fails = 0, False

    def forward(self, x):
        self.runs += 1
        if self.fails:
            raise ValueError("told to")
        return super().forward(x)


def test_it_runs_twice_in_a_step_and_a_failure_leaves_no_trace():
    model = nn.Sequential(Watched(), nn.Linear(8, 3))
    program = compiled(model, "dgl", ["0"], recompute="0", example_inputs=X, verify=False)
    model[0].runs = 0
    program.step(*batch(0))
    assert model[0].runs == 2
    program.evaluate([batch(0)])
    assert model[0].runs == 3
    model[0].fails = True
    with pytest.raises(LoccError):
        program.step(*batch(1))
    assert "forward" not in model[0].__dict__


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ("0.iner", {}, "recompute='0.iner' matches no submodule; nearest: '0.inner'"),
        ("0", {"splits": ["0.inner"]}, "recompute='0': the splits open that submodule"),
        (2, {}, "recompute=2: give names or globs"),
        (True, {"backend": "inductor"}, "recompute=True is of backend='eager'"),
        (True, {"splits": ["0.inner.2", "0.outer.1"]}, "every submodule that is called is a single layer"),
    ],
)
def test_what_cannot_be_is_refused(asked, options, message):
    model = nn.Sequential(Block(), nn.Linear(8, 3))
    before = snapshot(model)
    with pytest.raises(LoccError, match=message.replace("?", r"\?")):
        compiled(model, "dgl", **{"splits": ["0"], "example_inputs": X, "recompute": asked} | options)
    assert same(before, snapshot(model))
