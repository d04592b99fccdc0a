"""A wave is another order of the steps: the same bits, module after module."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import locc
from locc import LoccError, MethodError, RunError
from locc.callbacks import Callback
from runtime.turns import batches, every_other, network
from support import compiled, everything, mlp, same, sgd

LR = torch.optim.lr_scheduler


def trained(method: str, **options: Any) -> dict[str, torch.Tensor]:
    program = every_other(network(), method, seed=1, **options)
    # The last batch of a pass has another size.
    program.fit(batches(4, 4, 4, 3), 2, progress=False, scheduler_interval="step")
    return everything(program)


USUAL = ("al", "dgl", "dtp")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=() if m in USUAL else pytest.mark.slow)
        for m in sorted(locc.methods())
        if m not in ("admm", "bcd2", "bcd3", "dladmm", "gim")  # undefined on this network
    ],
)
def test_waves_end_with_the_bits_of_lockstep(method: str) -> None:
    if not compiled(network(), method, ["0", "1"]).certificate.pipeline_exact:
        with pytest.raises(MethodError, match="not pipeline-exact"):
            trained(method, schedule="wave")
        return
    expected = trained(method, schedule="lockstep")
    found = trained(method, schedule="wave", batches=3)
    header = [json.loads(bytes(state.pop("header").tolist())) for state in (expected, found)]
    assert same(expected, found)
    assert header[0]["steps"] == header[1]["steps"] >= 8
    assert header[0]["schedulers"] == header[1]["schedulers"]


def test_a_module_trains_on_all_batches_before_the_next_one_starts() -> None:
    program = compiled(mlp(), "dgl", ["first", "second"], schedule="wave", batches=2, optimizer=sgd())
    seen: list[tuple[int, str]] = []
    reports = program.wave(batches(5, 5, 5), lambda number, owners, _: seen.append((number, owners[0])))
    assert seen == [(n, m) for m in ("first", "second", "third") for n in range(3)]
    assert [set(r.objectives) for r in reports] == [{"first.loss", "second.loss", "third.loss"}] * 3
    assert program.steps == 3


class Log(Callback):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_update(self, fit: Any, module: str, report: Any) -> None:
        self.told.append((module, float(report.objectives[f"{module}.loss"])))

    def on_step_end(self, fit: Any, report: Any) -> None:
        self.told.append(float(report.loss))


def test_callbacks_hear_of_every_batch_in_order() -> None:
    told = []
    for options in ({}, {"schedule": "wave", "batches": 2}):
        program = compiled(
            mlp(), "dgl", ["first", "second"], seed=0, optimizer=sgd(), accumulate=2, **options
        )
        log = Log()
        torch.manual_seed(0)
        program.model.load_state_dict({n: torch.full_like(t, 0.1) for n, t in mlp().state_dict().items()})
        program.fit(batches(5, 5, 5), progress=False, callbacks=[log])
        told.append(log.told)
    assert told[0] == told[1]
    assert len(told[0]) == 6  # three steps, and one update of three modules


def test_a_wave_that_fails_is_undone_whole_if_asked() -> None:
    program = compiled(
        mlp(),
        "dgl",
        ["first"],
        schedule="wave",
        atomic=True,
        optimizer=lambda ps: torch.optim.Adam(ps, lr=0.1),
    )
    program.wave(batches(5, 5))
    before = everything(program)
    (x, y), (other, _) = batches(5, 5)
    with pytest.raises(RunError, match="'first' is nan"):
        program.wave([(x, y), (other * torch.nan, y)])
    assert same(before, everything(program))


def test_what_is_refused() -> None:
    program = compiled(mlp(), "dgl", ["first"], schedule="wave")
    with pytest.raises(RunError, match="given no batch"):
        program.wave([])
    with pytest.raises(
        RunError, match=r"batch 1 of a wave has the shapes \[\(3, 4\), \(3,\)\], the first one"
    ):
        program.wave(batches(5, 3))
    assert program.steps == 0
    with pytest.raises(MethodError, match=r"method 'bp' is not pipeline-exact: gradient .*lockstep"):
        compiled(mlp(), "bp", ["first"], schedule="wave")
    with pytest.raises(MethodError, match="not pipeline-exact"):
        compiled(mlp(), "bp", ["first"], verify=False).wave(batches(5))
    with pytest.raises(LoccError, match="batches=0: give"):
        compiled(mlp(), "dgl", ["first"], schedule="wave", batches=0)
    with pytest.raises(LoccError, match=r"batches=4 is how many.*schedule='lockstep' was asked"):
        compiled(mlp(), "dgl", ["first"], batches=4)
