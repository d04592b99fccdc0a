"""Ranks that fail, do not fit, are stopped or killed: all know the cause; what goes on has the same bits."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import locc
from locc import CheckpointError, LoccError, RunError, compiler
from locc.runtime import checkpoint
from runtime.processes import Died, together
from runtime.several import SPLITS, cut, loader, program_of, stored
from runtime.turns import network
from support import batch, compiled, mlp, same


@pytest.mark.parametrize("interrupt", [False, True])
def test_all_stop_after_the_batch_at_which_rank_0_does(interrupt: bool, tmp_path: Path) -> None:
    found = together(3, cut, str(tmp_path / "file"), 8, "", interrupt)
    assert found == [(8, None if interrupt else "enough", interrupt)] * 3


def failing(rank: int, kind: str, **options: Any) -> Any:
    """Train where rank 1 fails in its tenth batch; return what is said."""
    program = program_of("dgl", "pipelined", timeout=3.0, **options)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        x, y = batch(4)
        for number in range(20):
            if number == 10 and rank == 1:
                if kind == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "silent":
                    time.sleep(8.0)
                if kind == "raises":
                    raise ValueError("a file is missing")
                if kind == "cut":
                    for _ in range(2):
                        signal.raise_signal(signal.SIGINT)
                if kind == "fewer":
                    return
            yield (x + 1 if kind == "other" and rank == 1 and number == 10 else x), y

    with pytest.raises((RunError, ValueError)) as caught:
        program.fit(batches(), 2, progress=False)
    with pytest.raises(RunError, match="broken off"):
        program.step(*batch(4))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "own", "told"),
    [
        ("killed", None, r"rank 1 \('1'\) is gone .* of step \d+"),
        pytest.param(
            "silent",
            "rank 1 .* silent",
            r"rank 1 \('1'\) has been silent for 3 s; rank \d waited .* step \d+",
            marks=pytest.mark.slow,
        ),
        ("raises", "a file is missing", r"rank 1 \('1'\) stopped at step 9: ValueError: a file is missing"),
        ("cut", "rank 0 goes on to a batch, and rank 1 to stop", "rank 1 .* after 10 steps"),
        ("fewer", "rank 0 goes on to a batch, and rank 1 to the end of a pass", "rank 1 .* after 10 steps"),
        ("other", "rank 0 and rank 1 have read different batches for step 10", "different batches"),
    ],
)  # fmt: skip
def test_one_that_fails_ends_all_with_its_name_and_cause(kind: str, own: str | None, told: str) -> None:
    first, middle, last = together(3, partial(failing, stages=[["0"], ["1"], ["2", "3"]]), kind)
    if own is None:
        assert isinstance(middle, Died)
    else:
        assert re.search(own, str(middle)), middle
    for text in (first, last):
        assert re.search("training stopped on every rank: .*" + told, str(text)), text


def slow_and_failing(rank: int) -> float:
    """Return for how long this rank trains until it knows that rank 1, for which it waits, has failed."""
    program = program_of("dgl", "pipelined", stages=[["0"], ["1", "2", "3"]])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(20):
            time.sleep(0.5 * rank)
            if number == 5 and rank == 1:
                raise ValueError("a file is missing")
            yield batch(4)

    started = time.monotonic()
    with pytest.raises((RunError, ValueError), match="a file is missing"):
        program.fit(batches(), progress=False)
    found = time.monotonic() - started
    time.sleep(4 * rank)  # whose connections are open for as long
    return found


def test_one_that_waits_looks_around() -> None:
    assert max(together(2, slow_and_failing)) < 6  # and does not only when a connection ends


@pytest.mark.slow
def test_a_replica_that_dies_ends_the_others() -> None:
    text, died = together(2, partial(failing, replicas=2), "killed")
    assert isinstance(died, Died)
    assert re.search(
        r"stopped on every rank: rank 1 \('0', '1', '2', '3'\) is gone at step \d+ ", str(text)
    ), text


def misfit(rank: int, kind: str) -> str:
    options: dict[str, Any] = {}
    model = network(3)
    if kind == "model" and rank:
        model[1][1] = nn.Tanh()
    if kind == "clip" and rank:
        options["clip"] = 0.5
    if kind == "lr" and rank:
        options["optimizer"] = lambda params: torch.optim.SGD(params, lr=0.5)
    if kind == "stages":
        options["stages"] = [["0", "1", "2", "3"]]
    if kind == "odd":
        options["replicas"] = 3
    if kind == "buffer":
        options |= {"schedule": "replay", "buffer": 0}
    if kind == "visits":
        options["offload"] = "cpu"
    splits = SPLITS[: 0 if kind == "few" else 3]
    options = {"schedule": "pipelined", "timeout": 20.0} | options
    compiler.device_for = lambda model: torch.device("cpu")  # where modules could visit
    if kind not in (
        "model",
        "clip",
        "lr",
        "fit",
    ):  # every rank knows by itself: none may leave while others connect
        torch.distributed.new_group = None
    try:
        program = locc.compile(model, "dgl", splits, example_inputs=batch(4)[0], **options)
        program.fit(loader(), progress=False, validation=None if rank else loader())
    except LoccError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("model", "do not run the same program: what differs first in graph or model is '.*ReLU.*Tanh"),
        ("clip", "rank 0 and rank 1 do not run the same program: clip= is None on rank 0 and 0.5 on rank 1"),
        ("lr", "lr of the optimizer of '0' is 0.1 on rank 0 and 0.5 on rank 1"),
        ("fit", "validation= of fit is 'given' on rank 0 and None on rank 1"),
        ("few", "2 processes were started, and the program has 1 modules: start at most 1, or split"),
        ("stages", "stages=.* is for 1 ranks, and 2 were started"),
        ("odd", "2 processes were started, and replicas=3 of each .* start a multiple of 3"),
        pytest.param(
            "buffer", "buffer=0 trains in lock-step, and 2 processes were started", marks=pytest.mark.slow
        ),
        pytest.param(
            "visits", "offload='cpu' is for training in one process, and 2 were", marks=pytest.mark.slow
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused(kind: str, said: str) -> None:
    for text in together(2, misfit, kind):
        assert re.search(said, str(text)), text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"stages": [["first"]]},
            "stages= is of schedule='pipelined' and 'replay', and schedule='lockstep' was",
        ),
        ({"timeout": 3.0}, "timeout= is of schedule='pipelined' and 'replay'"),
        ({"schedule": "pipelined", "timeout": 0}, "timeout=0: give seconds"),
        ({"replicas": 2}, "replicas= is of schedule='pipelined'"),
        ({"schedule": "pipelined", "replicas": 0}, "replicas=0: give how many ranks"),
        (
            {"schedule": "pipelined", "replicas": 2, "update": "in_backward"},
            "replicas=2 take the mean of all",
        ),
        ({"schedule": "pipelined", "atomic": True}, "atomic=True undoes a step that fails"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoccError, match=said):
        compiled(mlp(), "dgl", ["first"], **options)


def saving(rank: int, file: str) -> str:
    program = program_of("dgl", "pipelined")
    program.step(*batch(4))
    with pytest.raises(CheckpointError) as caught:
        program.save(file)
    return str(caught.value)


def test_a_file_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for text in together(2, saving, str(tmp_path / "missing" / "file")):
        assert re.search("cannot save to .*missing' does not exist", str(text)), text


def mortal(rank: int, schedule: str, file: str, victim: int, seconds: float) -> float:
    """Train from the last checkpoint on, and return the seconds; `victim` is killed after so many of them."""
    torch.manual_seed(0)
    program = program_of("dgl", schedule)
    if checkpoint.exists(file):
        program.load(file)
    if rank == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    started = time.perf_counter()
    program.fit(loader(), 4, progress=False, scheduler_interval="step", checkpoint=file, every=5)
    return time.perf_counter() - started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        ("lockstep", ""),
        ("sequential", ""),
        ("wave", ""),
        ("pipelined", ""),
        ("lockstep", "/"),
        ("pipelined", "/"),
    ],
)
def test_killed_at_any_moment_it_goes_on_with_the_same_bits(schedule: str, end: str, tmp_path: Path) -> None:
    size, whole = 2 if schedule == "pipelined" else 1, str(tmp_path / "whole")
    (span, *_) = together(size, mortal, schedule, whole, -1, 0.0)
    draw = random.Random(schedule)
    died = 0
    for number in range(15):
        file = f"{tmp_path}/{number}{end}"
        found = together(size, mortal, schedule, file, draw.randrange(size), draw.uniform(0.0, span))
        died += any(isinstance(one, Died) for one in found)
        together(size, mortal, schedule, file, -1, 0.0)
        assert same(load_file(whole), stored(Path(file))), number
    assert died >= 8


SCRIPT = """
import os, sys
import torch
from torch import nn
import locc

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)], nn.Linear(8, 3))
data = list(zip(torch.randn(20, 4, 8), torch.randint(3, (20, 4))))

class Data:
    def __iter__(self):
        for number, batch in enumerate(data):
            first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
            if number == 12 and first and os.environ["RANK"] == "1":
                os.kill(os.getpid(), 9)
            yield batch

program = locc.compile(model, "dgl", ["0", "1"], example_inputs=data[0][0], schedule="pipelined", seed=0)
program.fit(Data(), 2, progress=False, checkpoint=sys.argv[1], every=5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "/"])
def test_torchrun_starts_again_and_fit_goes_on(end: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    one, two = f"{tmp_path}/one{end}", f"{tmp_path}/two{end}"
    plain = [sys.executable, script, one]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for command in (plain, [*run, script, two]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
    assert same(stored(Path(one)), stored(Path(two)))
