"""Neighbours compiled as one: what lock-step trains, within a budget, and why some run by themselves."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import locc
from benchmarks.meter import allocated
from locc import LoccError, MethodError, RunError
from support import compiled, everything, mlp

LR = torch.optim.lr_scheduler


def chain(*odd: nn.Module) -> nn.Sequential:
    """A chain of unequal blocks, with some odd ones before the last layer."""
    torch.manual_seed(0)
    sizes = [(6, 8), (8, 8), (8, 6)]
    blocks = [nn.Sequential(nn.Linear(*size), nn.Tanh()) for size in sizes]
    return nn.Sequential(*blocks, *odd, nn.Linear(6, 3)).double()


def batches(count: int, size: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 6, generator=draw, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (count, size), generator=draw), strict=True))


def program_of(group: str | None, model: nn.Module | None = None, method: str = "dgl", **options: Any) -> Any:
    model = chain() if model is None else copy.deepcopy(model)
    splits = [str(i) for i in range(len(list(model)) - 1)]
    given: dict[str, Any] = {
        "optimizer": lambda ps: torch.optim.Adam(ps, lr=0.01),
        "seed": 0,
        "verify": False,
    }
    given |= {"backend": "aot_eager", "group": group} if group else {}
    return locc.compile(model, method, splits, example_inputs=batches(1)[0][0], **{**given, **options})


def trained(group: str | None, *args: Any, **options: Any) -> Any:
    program = program_of(group, *args, **options)
    data = [*batches(3), *batches(1, 3)]
    history = program.fit(data, 2, progress=False, scheduler_interval="step")
    return program, [(epoch.loss, epoch.metrics) for epoch in history.epochs]


def close(left: Any, right: Any) -> None:
    torch.testing.assert_close(everything(left), everything(right), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "predsim"},
        {"accumulate": 2, "clip": 0.1},
        {"scheduler": lambda o: LR.ExponentialLR(o, 0.9)},
        {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1)},
    ],
    ids=["dgl", "predsim", "accumulate, clip", "scheduler", "no state"],
)
def test_it_trains_what_lockstep_does(options: dict[str, Any]) -> None:
    one, seen = trained(None, **options)
    other, found = trained("1MiB", strict=True, **options)
    close(one, other)
    for (loss, metrics), (expected, others) in zip(found, seen, strict=True):
        assert loss == pytest.approx(expected, abs=1e-11)
        assert metrics == pytest.approx(others, abs=1e-11)
    assert other.backend_report.groups == (("0", "1", "2", "3"),)


def test_it_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    first, second = trained("1MiB")[0], program_of("1MiB")
    first.save(tmp_path / "file")
    second.load(tmp_path / "file")
    for program in (first, second):
        for each in batches(3, seed=2):
            program.step(*each)
    close(first, second)


def test_groups_keep_to_the_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(8)], nn.Linear(6, 3))
    program = program_of("5500", model.double(), strict=True)
    program.step(*batches(1)[0])
    program.step(*batches(1)[0])
    assert [len(group) for group in program.backend_report.groups] == [3, 3, 3]
    assert 2_750 < allocated(lambda: program.step(*batches(1)[0])) <= 5_500


class Hooked(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ([nn.Dropout(0.5)], "it draws random numbers"),
        ([Hooked()], "a hook runs with its Hooked"),
        ([nn.BatchNorm1d(6)], "it writes a buffer, as BatchNorm does"),
        ([nn.Linear(6, 200), nn.Linear(200, 6)], "a group with a neighbour allocates more than group=20000"),
    ],
)
def test_what_runs_by_itself_says_why(odd: list[nn.Module], why: str) -> None:
    model = chain(nn.Sequential(nn.Linear(6, 6), *odd).double())
    (one, seen), (other, found) = trained(None, model), trained("20KB", model)
    close(one, other)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in seen], abs=1e-11)
    assert other.backend_report.groups == (("0", "1", "2"),)
    beside = why if "neighbour" in why else "no module beside it can join"
    assert other.backend_report.alone == {"3": why, "4": beside}
    assert f"3: in no group, for {why}" in str(other.backend_report)


def test_strict_refuses_that_and_undoes_the_step() -> None:
    program = program_of("1MiB", chain(nn.Sequential(nn.Linear(6, 6), nn.Dropout())), strict=True)
    before = everything(program)
    with pytest.raises(RunError, match="module '3' is in no group, for it draws random numbers; leave out"):
        program.step(*batches(1)[0])
    torch.testing.assert_close(everything(program), before, rtol=0, atol=0)


def test_a_step_that_stops_is_that_of_lockstep() -> None:
    told = []
    programs = [trained(group)[0] for group in (None, "1MiB")]
    for program in programs:
        with torch.no_grad():
            program.model[2][0].weight.fill_(float("nan"))
        with pytest.raises(
            RunError, match=r"module '2' is nan.*Updated before that: '0', '1'; compile"
        ) as error:
            program.step(*batches(1)[0])
        told.append(str(error.value))
        program.model[2][0].weight.data.fill_(0.0)
        assert all(p.grad is None for p in program.root.parameters())
    assert told[0] == told[1]
    close(*programs)


class Picky(nn.Module):
    wrong = 5

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == self.wrong:
            raise ValueError("as many samples")
        return x


def test_what_is_wrong_with_a_batch_is_no_reason_to_leave_the_group() -> None:
    program = trained("1MiB", chain(nn.Sequential(nn.Linear(6, 6), Picky())), strict=True)[0]
    with pytest.raises(RunError, match="in module '3', objective 'loss': ValueError: as many samples"):
        program.step(*batches(1, 5)[0])
    assert not program.backend_report.alone


def test_a_hook_that_comes_later_runs_and_operators_are_counted() -> None:
    seen: list[int] = []
    programs = [trained(group)[0] for group in (None, "1MiB")]
    for program in programs:
        hook = program.model[1].register_forward_hook(lambda *_: seen.append(1))
        program.step(*batches(1, seed=3)[0])
        hook.remove()
        with FlopCounterMode(display=False) as counter:
            program.step(*batches(1, seed=4)[0])
        seen.append(counter.get_total_flops())
    assert seen[:2] == seen[2:]
    close(*programs)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_inductor_compiles_a_group_and_keeps_to_the_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)], nn.Linear(6, 3))
    one = program_of(None, model.double())
    other = program_of("5500", model, backend="inductor")
    for each in batches(4):
        one.step(*each)
        other.step(*each)
    close(one, other)
    assert [len(group) for group in other.backend_report.groups] == [3, 3]
    assert 2_000 < allocated(lambda: other.step(*batches(1)[0])) <= 5_500
    with FlopCounterMode(display=False) as counter:  # which sees no operator of compiled code
        other.step(*batches(1)[0])
    assert counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "eager"}, "group='1MiB' compiles neighbours .* use backend='inductor'"),
        ({"group": "much"}, "group='much': give a number of bytes"),
        ({"schedule": "wave"}, "schedule='wave' does not; use schedule='lockstep'"),
        ({"autocast": "bfloat16"}, "does not work with autocast="),
        ({"update": "in_backward"}, "does not work with update="),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoccError, match=said):
        compiled(mlp(), "dgl", ["first"], **{"backend": "inductor", "group": "1MiB", **options})


def test_a_program_with_a_way_down_is_refused() -> None:
    program = program_of("1MiB", method="bp")
    with pytest.raises(MethodError, match=r"group= ends a module's step .* leave out group="):
        program.step(*batches(1)[0])
