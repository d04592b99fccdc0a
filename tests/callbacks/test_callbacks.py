"""Callbacks see a fit where it is whole; stopping, raising and Ctrl-C leave it so that it can go on."""

from __future__ import annotations

import csv
import functools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from locc import LoccError, Program
from locc.callbacks import BestCheckpoint, Callback, CSVLog, EarlyStopping, Fit, ProgressBar, TensorBoard
from locc.runtime.history import Epoch, Evaluation
from runtime.cut import SCENES, seed_everything
from support import batch, compiled, everything, mlp, same, sgd

DATA = [batch(4), batch(4)]
EVENTS = ("fit_start", "epoch_start", "update", "step_end", "epoch_end", "fit_end")


class Noting(Callback):
    """Notes each event, and has something happen at one of them."""

    def __init__(self, event: str = "", number: int = 0, error: BaseException | None = None) -> None:
        self.seen: list[str] = []
        self.event, self.number, self.error = event, number, error
        for name in EVENTS:
            setattr(self, f"on_{name}", functools.partial(self.note, name))

    def note(self, name: str, fit: Fit, *what: Any) -> None:
        self.seen.append(f"{name} {what[0]}" if name == "update" else name)
        if name == self.event and [s.split()[0] for s in self.seen].count(name) == self.number:
            if self.error is None:
                fit.stop("it is enough")
            else:
                raise self.error


def program(**options: Any) -> Program:
    return compiled(mlp(), "dgl", ["relu1", "relu2"], seed=0, **options)


# ---- what they see -----------------------------------------------------------------------------

STEP = ["update relu1", "update relu2", "update third", "step_end"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [*STEP, *STEP]),
        ({"accumulate": 2}, ["step_end", *STEP]),
        ({"schedule": "sequential"}, ["update relu1", "step_end"] * 2),
    ],
)
def test_events_come_in_order_and_name_what_was_updated(options: dict[str, Any], steps: list[str]) -> None:
    noting = Noting()
    program(**options).fit(DATA, progress=False, callbacks=[noting])
    first = noting.seen[: noting.seen.index("epoch_end") + 1]
    assert first == ["fit_start", "epoch_start", *steps, "epoch_end"]
    assert noting.seen[-1] == "fit_end"


def test_a_fit_tells_where_it_stands() -> None:
    seen: list[tuple[Any, ...]] = []

    class Looking(Callback):
        def on_step_end(self, fit: Fit, report: Any) -> None:
            seen.append((fit.epoch, fit.done, fit.batches, set(fit.means()) <= set(fit.names)))

        def on_epoch_end(self, fit: Fit, epoch: Epoch) -> None:
            assert epoch is fit.history.epochs[-1]
            assert list(epoch.metrics) == fit.names

    program().fit(DATA, 2, validation=DATA, progress=False, callbacks=[Looking()])
    assert seen == [(e, d, 2, True) for e in (1, 2) for d in (1, 2)]


def test_no_value_is_read_in_a_step_unless_a_callback_asks(tmp_path: Path) -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(*callbacks: Callback) -> int:
        trained = program(optimizer=sgd())
        with Reads() as counting:
            trained.fit(DATA * 4, validation=DATA, progress=False, callbacks=callbacks)
        return counting.count

    class Asking(Callback):
        def on_step_end(self, fit: Fit, report: Any) -> None:
            float(report.loss)

    quiet = (CSVLog(tmp_path / "log.csv"), EarlyStopping(), BestCheckpoint(tmp_path / "best"), Callback())
    assert reads(*quiet) == reads()
    assert reads(Asking()) == reads() + 8


# ---- how it ends -------------------------------------------------------------------------------


@functools.cache
def uncut(scene: str) -> dict[str, Tensor]:
    whole = SCENES[scene].program()
    seed_everything(7)
    SCENES[scene].fit(whole, SCENES[scene].loader(7))
    return everything(whole)


def goes_on(scene: str, cutting: Noting, error: BaseException | None) -> None:
    end = uncut(scene)
    trained, loader, other = SCENES[scene].program(), SCENES[scene].loader(7), Noting()
    seed_everything(7)
    if error is None:
        history = SCENES[scene].fit(trained, loader, callbacks=[other, cutting])
        assert (history.stopped, history.interrupted) == ("it is enough", False)
    elif isinstance(error, KeyboardInterrupt):
        assert SCENES[scene].fit(trained, loader, callbacks=[other, cutting]).interrupted
    else:
        with pytest.raises(type(error)) as found:
            SCENES[scene].fit(trained, loader, callbacks=[other, cutting])
        assert found.value is error
    assert other.seen[-1] == "fit_end"
    assert trained.training
    if cutting.event != "fit_end":  # then the fit was over
        assert not same(everything(trained), end)
        SCENES[scene].fit(trained, loader)
    assert same(everything(trained), end)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("scene", ["lockstep", "atomic"])
def test_what_a_callback_raises_arrives_and_the_fit_goes_on_with_the_same_bits(
    scene: str, event: str
) -> None:
    error = ZeroDivisionError("in the callback")
    goes_on(scene, Noting(event, 1 if event.startswith("fit") else 2, error), error)


@pytest.mark.parametrize("event", ["fit_start", "step_end", "epoch_end"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["stop", "Ctrl-C"])
def test_stopping_and_ctrl_c_leave_a_fit_that_goes_on(event: str, error: BaseException | None) -> None:
    goes_on("sequential", Noting(event, 1 if event.startswith("fit") else 2, error), error)


def test_callbacks_that_started_are_told_of_the_end_when_another_cannot_start() -> None:
    first, last, failing = Noting(), Noting(), Noting("fit_start", 1, OSError("full"))
    trained = program()
    with pytest.raises(OSError, match="full"):
        trained.fit(DATA, progress=False, callbacks=[first, failing, last])
    assert (first.seen, last.seen) == (["fit_start", "fit_end"], [])
    assert (trained.steps, trained.progress) == (0, None)


# ---- early stopping and the best checkpoint ------------------------------------------------------


def epochs(name: str, values: list[float | None]) -> list[Epoch]:
    return [Epoch(i, None, None, {} if v is None else {name: v}, 0.0) for i, v in enumerate(values)]


NAN = float("nan")


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "better"),
    [
        (None, 0.0, [3, 2, 2, 1], [True, True, False, True]),
        ("max", 0.0, [3, 2, 4], [True, False, True]),
        (None, 0.5, [3, 2.6, 2.4, 2.0], [True, False, True, False]),
        (None, 0.0, [NAN, 3, NAN, 2, None], [False, True, False, True, None]),
    ],
)
def test_what_is_better(mode: Any, min_delta: float, values: list[Any], better: list[Any]) -> None:
    watching = EarlyStopping("a.loss", min_delta=min_delta, mode=mode)
    assert [watching.better(epoch) for epoch in epochs("a.loss", values)] == better


def test_an_accuracy_is_better_when_it_is_higher() -> None:
    assert (EarlyStopping("validation_accuracy").mode, EarlyStopping("loss").mode) == ("max", "min")


@pytest.mark.parametrize(("method", "passes"), [("dgl", 3), ("dtp", 6)])
def test_it_stops_when_nothing_has_become_better(method: str, passes: int) -> None:
    """dtp computes the loss in every second pass; the others do not count."""
    trained = compiled(mlp(), method, ["relu1", "relu2"], optimizer=sgd(0.0))
    history = trained.fit(DATA, 9, progress=False, callbacks=[EarlyStopping("loss", patience=2)])
    assert len(history.epochs) == passes
    assert "'loss' has not become better than" in str(history.stopped)


def test_what_they_know_lives_in_the_checkpoint(tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> Any:
        callbacks = [EarlyStopping("loss", patience=2), BestCheckpoint(best, "loss")]
        return trained.fit(DATA, epochs, progress=False, checkpoint=saved, callbacks=callbacks, **options)

    saved, best = tmp_path / "last", tmp_path / "best"
    trained = program(optimizer=sgd(0.0))
    assert len(fit(1).epochs) == 1
    assert fit(5, resume=False).stopped
    first = best.read_bytes()
    trained = program(optimizer=sgd(0.0))
    trained.load(saved)
    history = fit(5)
    assert history.stopped
    assert history.epochs == []
    assert best.read_bytes() == first
    trained.progress = None
    assert len(fit(5).epochs) == 3  # a new fit knows nothing of it


def test_the_best_checkpoint_is_that_of_the_best_pass(tmp_path: Path) -> None:
    trained, path = program(optimizer=sgd()), tmp_path / "best"
    trained.fit(DATA, 3, progress=False, callbacks=[BestCheckpoint(path, "loss", mode="max")])
    other = program(optimizer=sgd())
    other.load(path)
    assert (other.steps, other.epochs) == (2, 1)


# ---- logs --------------------------------------------------------------------------------------


def test_a_csv_file_has_a_row_for_each_pass_and_is_continued(tmp_path: Path) -> None:
    path, trained = tmp_path / "log.csv", program(optimizer=sgd())
    histories = [
        trained.fit(DATA, n, validation=DATA, progress=False, callbacks=[CSVLog(path)]) for n in (2, 1)
    ]
    rows = list(csv.DictReader(path.open()))
    assert [row["steps"] for row in rows] == ["2", "4", "6"]
    for row, epoch in zip(rows, [e for h in histories for e in h.epochs], strict=True):
        assert {name: float(row[name]) for name in epoch.metrics} == epoch.metrics
    with pytest.raises(LoccError, match=r"has the columns epoch, .* give another file"):
        trained.fit(DATA, progress=False, callbacks=[CSVLog(path)])


def test_tensorboard_gets_every_metric_and_the_steps_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == "runs"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert isinstance(value, float)
            written.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    history = program().fit(DATA, progress=False, callbacks=[TensorBoard("runs", every=2)])
    metrics = history.epochs[0].metrics
    assert [name for name, _, step in written if step == 2] == [
        f"{what}/{name}" for what in ("step", "epoch") for name in metrics
    ]
    assert [v for name, v, _ in written if name.startswith("epoch")] == list(metrics.values())
    assert written[-1][0] == "closed"


def test_without_tensorboard_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LoccError, match=r"pip install 'locc\[tensorboard\]'"):
        TensorBoard("runs")


def test_a_bar_without_lines_leaves_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    program().fit(DATA, 2, progress=False, callbacks=[ProgressBar(lines=False)])
    assert capsys.readouterr().out == ""


# ---- misuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EarlyStopping("validation_loss"), "give fit a validation= loader"),
        (lambda: EarlyStopping("relu1.los"), r"watches 'relu1\.los', .*; nearest: 'relu1\.loss'"),
        (lambda: EarlyStopping("loss", 0), "patience=0; give a number of passes"),
        (lambda: EarlyStopping("loss", mode="least"), "mode='least'; choose 'min' or 'max'"),
        (lambda: EarlyStopping("loss", min_delta=-1), "min_delta=-1; give"),
        (lambda: CSVLog("/nowhere/at/all.csv"), "cannot write '/nowhere/at/all.csv'"),
        (lambda: print, "must be instances of locc.callbacks.Callback; found <built-in"),
        (lambda: EarlyStopping, "must be instances of locc.callbacks.Callback; found <class"),
    ],
)
def test_misuse_is_told_before_anything_is_trained(make: Any, message: str) -> None:
    trained = program()
    with pytest.raises(LoccError, match=message):
        trained.fit(DATA, progress=False, callbacks=[make()])
    assert (trained.steps, trained.progress) == (0, None)


def test_an_accuracy_that_no_pass_has_is_an_error() -> None:
    with pytest.raises(LoccError, match="the target has no classes; watch 'validation_loss'"):
        EarlyStopping("validation_accuracy").better(Epoch(1, None, 1.0, {}, 0.0, Evaluation(1.0, None, 4)))
    x = batch(4)[0]
    trained = compiled(mlp(), "bp", ["relu1"], loss="mse")
    data = [(x, torch.zeros(4, 3))]
    with pytest.raises(LoccError, match="no classes"):
        trained.fit(data, validation=data, progress=False, callbacks=[EarlyStopping("validation_accuracy")])


def test_a_state_that_is_not_json_is_told(tmp_path: Path) -> None:
    class Odd(Callback):
        def state(self) -> Any:
            return torch.zeros(2)

    with pytest.raises(LoccError, match=r"what Odd\.state\(\) returns is not JSON"):
        program().fit(DATA, progress=False, checkpoint=tmp_path / "c", callbacks=[Odd()])
