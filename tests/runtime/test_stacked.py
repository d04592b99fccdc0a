"""Modules of one structure that run as one: what lock-step trains, and why the others run by themselves."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor, nn

import locc
from locc import LoccError, RunError
from locc.optimizers import take_step
from locc.runtime.stacked import Stack
from support import Centred, compiled, everything, mlp

LR = torch.optim.lr_scheduler


def chain(*odd: nn.Module, width: int = 6, depth: int = 5) -> nn.Sequential:
    """A chain of equal blocks, with some odd ones before the last layer."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*blocks, *odd, nn.Linear(width, 3)).double()


def batches(count: int, size: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 6, generator=draw, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (count, size), generator=draw), strict=True))


def program_of(backend: str, method: str = "dgl", model: nn.Module | None = None, **options: Any) -> Any:
    model = chain() if model is None else model
    splits = [str(i) for i in range(len(list(model)) - 1)]
    options = {"optimizer": lambda ps: torch.optim.Adam(ps, lr=0.01), "seed": 0, **options}
    return locc.compile(
        model, method, splits, example_inputs=batches(1)[0][0], schedule="wave", batches=7, backend=backend,
        **options,
    )  # fmt: skip


def close(left: Any, right: Any) -> None:
    torch.testing.assert_close(everything(left), everything(right), rtol=0, atol=1e-11)


def trained(backend: str, *args: Any, **options: Any) -> Any:
    program = program_of(backend, *args, **options)
    data = [*batches(9), *batches(2, 3)]  # a full wave, one of two batches, and one of smaller ones
    history = program.fit(data, 2, progress=False, scheduler_interval="step")
    return program, [epoch.metrics for epoch in history.epochs]


@pytest.mark.parametrize(
    "method", ["dgl", *(pytest.param(m, marks=pytest.mark.slow) for m in ("predsim", "al"))]
)
def test_it_trains_what_lockstep_does(method: str) -> None:
    one, seen = trained("eager", method)
    other, found = trained("vmap", method)
    close(one, other)
    assert found == [pytest.approx(each, abs=1e-11) for each in seen]
    assert not all(piece.reason for piece in other.backend_report.pieces)


def test_buffers_are_each_module_s_own() -> None:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(6, 6, False), nn.BatchNorm1d(6), nn.Tanh(), Centred()) for _ in range(4)
    ]
    model = nn.Sequential(*blocks, nn.Linear(6, 3)).double()
    one, other = trained("eager", model=copy.deepcopy(model))[0], trained("vmap", model=model)[0]
    close(one, other)
    assert [piece.reason is None for piece in other.backend_report.pieces] == [True] * 4 + [False]


class Spare(nn.Module):
    """Has a layer that it does not use, and one of which it drops the result."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.dropped = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.used(x).tanh()


def test_the_last_module_joins_where_its_head_is_that_of_the_others() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))).double()
    one, seen = trained("eager", model=copy.deepcopy(model))
    other, found = trained("vmap", model=model)
    close(one, other)
    assert not any(piece.reason for piece in other.backend_report.pieces)
    data = batches(7, seed=3)
    losses = [[report.loss for report in program.wave(data)] for program in (one, other)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-11)
    assert found == [pytest.approx(each, abs=1e-11) for each in seen]


class Own(torch.optim.Adam):
    """An optimizer that is not PyTorch's own: it may do anything."""


def test_what_no_gradient_reaches_does_not_decay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Spare() for _ in range(4)], nn.Linear(6, 3)).double()
    decaying = {"optimizer": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5)}
    one = trained("eager", model=copy.deepcopy(model), **decaying)[0]
    other = trained("vmap", model=model, **decaying)[0]
    assert not any(piece.reason for piece in other.backend_report.pieces[:-1])
    close(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2, "clip": 0.1},
        {"scheduler": lambda o: LR.ExponentialLR(o, 0.9)},
        {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True)},
        {"optimizer": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True)},
        {"optimizer": lambda ps: torch.optim.Adafactor(ps, lr=0.01)},
        {"optimizer": lambda ps: Own(ps, lr=0.01)},
    ],
    ids=["accumulate, clip", "scheduler", "fused", "amsgrad", "of all elements", "somebody's own"],
)
def test_optimizers_do_what_they_do_one_by_one(options: dict[str, Any]) -> None:
    close(trained("eager", **options)[0], trained("vmap", **options)[0])


@pytest.mark.parametrize("options", [{}, {"scheduler": lambda o: LR.StepLR(o, 1)}], ids=["", "scheduler"])
def test_one_optimizer_steps_for_all(options: dict[str, Any]) -> None:
    program = program_of("vmap", **options)
    program.wave(batches(7))
    with patch("locc.runtime.joined.take_step", wraps=take_step) as steps:
        program.wave(batches(7))
    assert steps.call_count == 7 + 5 - 1


def test_it_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    first, whole = program_of("vmap"), program_of("vmap")
    first.wave(batches(7))
    first.save(tmp_path / "file")
    second = program_of("vmap")
    second.load(tmp_path / "file")
    whole.wave(batches(7))
    for program in (whole, second):
        program.wave(batches(7, seed=2))
    close(whole, second)


class Counting(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 1.5


class Hooked(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda *_: None)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else x + 0


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (nn.Dropout(0.5), "draws random numbers"),
        (Counting(), "Counting sets an attribute in each step"),
        (Hooked(), "a hook runs with its Hooked"),
        (Branching(), "Error"),
        (nn.ReLU(), "no other module has its structure"),
    ],
)
def test_what_runs_by_itself_says_why(odd: nn.Module, why: str) -> None:
    model = chain(nn.Sequential(nn.Linear(6, 6), odd))
    program, other = program_of("vmap", model=model), program_of("eager", model=copy.deepcopy(model))
    program.wave(batches(7))
    other.wave(batches(7))
    close(program, other)
    report = program.backend_report
    assert {piece.module: piece.reason is None for piece in report.pieces} == {
        **{str(i): True for i in range(5)}, "5": False, "6": False
    }  # fmt: skip
    assert why in next(piece.reason for piece in report.pieces if piece.module == "5")


def test_failures_name_the_modules() -> None:
    program = program_of("vmap")
    program.wave(batches(7))
    error = Mock(side_effect=IndexError("no such row"))
    told = pytest.raises(RunError, match="in '0', of the modules that run as one: IndexError: no such row")
    with patch.object(Stack, "run", error), told:
        program.wave(batches(7))


@pytest.mark.parametrize("backend", ["eager", "vmap"])
def test_a_wave_that_stops_says_what_it_has_updated(backend: str) -> None:
    program = program_of(backend)
    program.wave(batches(7))
    with torch.no_grad():
        program.model[2][0].weight.fill_(float("nan"))
    with pytest.raises(RunError, match=r"module '2' is nan.*Updated before that: '0', '1'; compile"):
        program.wave(batches(7))
    assert all(p.grad is None for p in program.root.parameters())
    steps = [program.optimizers[name].state[program.model[int(name)][0].weight]["step"] for name in "0123"]
    assert steps == ([14, 14, 7, 7] if backend == "eager" else [9, 8, 7, 7])  # a batch ahead of each other


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": "lockstep"}, r"backend='vmap' runs modules .* add schedule='wave', batches=T"),
        ({"autocast": "bfloat16"}, "backend='vmap' does not work with autocast="),
        ({"update": "in_backward"}, "does not work with update="),
        ({"strict": True}, "backend='vmap' compiles none"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoccError, match=said):
        compiled(mlp(), "dgl", ["first"], backend="vmap", **{"schedule": "wave", **options})
