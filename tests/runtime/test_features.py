"""Features: what rests is computed once a stage, and training ends as it does without."""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import locc
from locc.callbacks import Callback, Fit
from locc.ir.spec import BatchDim, TensorSpec
from locc.runtime import records
from locc.runtime.rows import Layout, row_dim
from runtime.turns import norms
from support import Residual, same, snapshot

SAMPLES, SIZE = 22, 5
"""The last batch is of two samples."""


def conv() -> nn.Sequential:
    """Three convolutions with BatchNorm and dropout, `0` to `2`, and a linear layer."""

    def block(before: int, after: int) -> nn.Sequential:
        layers = (nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout(0.3))
        return nn.Sequential(*layers)

    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(block(1, 4), block(4, 6), block(6, 6), end)


class Sequences(nn.Module):
    """Hands on values whose samples lie along the second dimension, or in one with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.tanh(self.a(x.unflatten(1, (2, 2)).repeat(1, 1, 2))).transpose(0, 1)
        rows = torch.tanh(self.b(steps)).transpose(0, 1).flatten(0, 1)
        return self.c(rows).unflatten(0, (-1, 2)).mean(1)


class Among(nn.Module):
    """A layer whose output, at rest, is not its parameters' and the sample's alone."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(4, 8), what
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        if self.what == "samples beside it":
            return x - x.mean(0)
        if self.what == "those before it":
            return x.cumsum(0)
        if self.what == "chance":
            return x + torch.rand(())  # one number for all samples of a step
        if self.what == "its state":
            self.calls += 1
        return x


def data(model: nn.Module, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    shape = (1, 8, 8) if any(isinstance(m, nn.Conv2d) for m in model.modules()) else (4,)
    x = torch.randn(SAMPLES, *shape, generator=generator).to(dtype)
    return TensorDataset(x, torch.randint(3, (SAMPLES,), generator=generator))


def trained(
    model: nn.Module,
    method: str = "dgl",
    splits: Any = ("a", "b"),
    loader: Any = None,
    callbacks: Any = (),
    **options: Any,
) -> tuple[dict[str, Tensor], list[float | None]]:
    """Train a copy sequentially; return the state it ends with, and the shares that were reused."""
    model = copy.deepcopy(model)
    known = data(model, next(model.parameters()).dtype)
    options.setdefault("schedule", "sequential")
    example = known.tensors[0][:4]
    program = locc.compile(model, method, splits, seed=1, verify=False, example_inputs=example, **options)
    loader = DataLoader(known, batch_size=SIZE) if loader is None else loader
    history = program.fit(loader, epochs=3, progress=False, callbacks=callbacks)
    assert program.features is None
    return snapshot(program.root), [epoch.reused for epoch in history.epochs]


# ---- the same training -------------------------------------------------------------------------

torch.manual_seed(0)
NORMS = norms()
ALIKE: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "BatchNorm and dropout": (NORMS, {}),
    "convolutions, on disk": (conv(), {"splits": ["0", "1", "2"], "features": "disk"}),
    "convolutions, channels_last": (conv().to(memory_format=torch.channels_last), {"splits": ["0", "1"]}),
    "predsim": (conv(), {"method": "predsim", "splits": ["1"]}),
    "infopro reads the input again": (conv(), {"method": "infopro", "splits": ["1"]}),
    "greedy-seq has phases": (NORMS, {"method": "greedy-seq", "schedule": "lockstep"}),
    "several values cross, on disk": (Residual(), {"splits": ["inp", "blocks.1"], "features": "disk"}),
    "positions, samples second": (Sequences(), {}),
    "accumulate": (NORMS, {"accumulate": 3}),
    "bfloat16": (NORMS, {"autocast": "bfloat16"}),
}


@pytest.mark.parametrize("what", ALIKE)
def test_batches_that_come_again_end_with_the_same_bits(what):
    model, options = ALIKE[what]
    plain, without = trained(model, **{**options, "features": None})
    kept, reused = trained(model, **{"features": "memory", **options})
    assert same(plain, kept)
    assert set(without) == {None}
    stages = len(reused) // 3
    assert reused == [None, None, None] + [0.0, 1.0, 1.0] * (stages - 1)


def test_what_rests_runs_once_for_each_batch():
    calls = {"a": 0, "b": 0}

    class Counting(Callback):
        def on_fit_start(self, fit: Fit) -> None:
            for name in calls:
                part = fit.program.model.get_submodule(name)
                part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))

    batches = -(-SAMPLES // SIZE)
    trained(NORMS, callbacks=[Counting()])
    assert calls == {"a": 9 * batches, "b": 6 * batches}
    calls.update(a=0, b=0)
    trained(NORMS, callbacks=[Counting()], features="memory")
    assert calls == {"a": 5 * batches + 2, "b": 4 * batches + 1}  # each stage tries it a second time


@pytest.mark.parametrize(
    ("place", "limit", "all_batches"),
    [("memory", "1MB", True), ("memory", 24 * SAMPLES * 8, True), ("disk", "1MB", False)],
)
def test_shuffled_batches_end_with_the_same_weights_up_to_rounding(place, limit, all_batches, caplog):
    model = nn.Sequential()
    for name, before, after in (("a", 4, 64), ("b", 64, 24), ("c", 24, 3)):
        model.add_module(name, nn.Sequential(nn.Linear(before, after), nn.Tanh()))
    model = model.double()

    def loader() -> DataLoader:
        own = torch.Generator().manual_seed(1)
        known = data(model, torch.float64)
        return DataLoader(known, SIZE, shuffle=True, generator=own, drop_last=not all_batches)

    plain, _ = trained(model, loader=loader())
    kept, reused = trained(model, loader=loader(), features=place, features_limit=limit)
    for name, value in plain.items():
        assert torch.allclose(value, kept[name], rtol=1e-6, atol=0), name
    assert ("features_limit=4224 bytes are used" in caplog.text) == (limit != "1MB")
    if not all_batches:  # each pass leaves out two samples
        assert all(0.9 <= share < 1 for share in (reused[4], reused[7]))
        return
    part = 1.0 if limit == "1MB" else (24 * SAMPLES * 8 // (64 * 8)) / SAMPLES
    assert reused[3:6] == [0.0, part, part]
    assert reused[6:] == [0.0, 1.0, 1.0]


def test_what_trains_before_its_phase_comes_again_is_not_kept():
    _, reused = trained(NORMS, "tp", schedule="lockstep", features="memory")
    assert len(reused) == 6
    assert set(reused) == {None}


def test_what_somebody_changes_is_computed_again():
    class Changing(Callback):
        def on_epoch_end(self, fit: Fit, epoch: Any) -> None:
            if epoch.phase == "b" and epoch.number == 2:
                with torch.no_grad():
                    fit.program.model.a[0].weight.mul_(2)

    plain, _ = trained(NORMS, callbacks=[Changing()])
    kept, reused = trained(NORMS, callbacks=[Changing()], features="memory")
    assert same(plain, kept)
    assert reused[3:6] == [0.0, 1.0, 0.0]


# ---- what cannot be kept -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (
            "samples beside it",
            "'a' of 'a', which rests, is another one for a sample when others are beside it",
        ),
        ("those before it", "'a' of 'a', which rests, is another one for a sample when others are beside it"),
        ("chance", "'a' of 'a', which rests, is another one for a sample when others are beside it"),
        ("its state", "a module that rests changes its state in eval mode"),
    ],
)
def test_what_is_not_the_samples_own_is_computed_in_every_step(what, why, caplog):
    model = nn.Sequential()
    model.add_module("a", Among(what))
    model.add_module("b", nn.Linear(8, 3))
    plain, _ = trained(model, splits=["a"])
    kept, reused = trained(model, splits=["a"], features="memory")
    if what == "its state":
        assert kept.pop("model.a.calls") == plain.pop("model.a.calls") + 1
    assert same(plain, kept)
    assert set(reused) <= {None, 0.0}
    assert why in caplog.text


def test_a_value_without_rows_is_computed_in_every_step(caplog):
    class WithMean(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), super().forward(x).mean(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = WithMean(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            each, mean = self.a(x)
            return self.b(each + mean)

    model = Two()
    plain, _ = trained(model, splits=["a"])
    kept, reused = trained(model, splits=["a"], features="memory")
    assert same(plain, kept)
    assert set(reused) == {None}
    assert "(f32[8]), which 'a' hands on, has no row for each sample" in caplog.text


class Noisy:
    """Adds noise to every batch anew."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in DataLoader(data(NORMS), SIZE):
            yield x + torch.randn(x.shape), y


def test_augmented_inputs_are_noticed_once(caplog, monkeypatch):
    open_files = []
    monkeypatch.setattr(records.InFile, "close", lambda self: open_files.append(self._end))
    torch.manual_seed(0)
    plain, _ = trained(NORMS, loader=Noisy())
    torch.manual_seed(0)
    kept, reused = trained(NORMS, loader=Noisy(), features="disk")
    assert same(plain, kept)
    assert reused == [None] * 3 + [0.0, 0.0, None] + [None] * 3
    assert caplog.text.count("had been met in the one before") == 1
    assert open_files == [2 * SAMPLES * 8 * 4]


def test_a_full_disk_loses_nothing(caplog, monkeypatch):
    kept = records.InFile.keep

    def keep(self: Any, rows: Any) -> Any:
        if self._end > SAMPLES * 16:
            raise OSError(errno.ENOSPC, "No space left on device")
        return kept(self, rows)

    monkeypatch.setattr(records.InFile, "keep", keep)
    plain, _ = trained(NORMS)
    found, reused = trained(NORMS, features="disk")
    assert same(plain, found)
    assert reused[3:6] == [0.0, 3 * SIZE / SAMPLES, 3 * SIZE / SAMPLES]
    assert "No space left on device" in caplog.text


# ---- what stays --------------------------------------------------------------------------------


class Stop(Callback):
    """Raises in the second pass of the second module's stage."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_step_end(self, fit: Fit, report: Any) -> None:
        if fit.program.phase == "b" and fit.epoch == 2 and fit.done == 2:
            assert len(set(_unnamed())) == 1  # open, and mapped
            raise self.error


def _unnamed() -> Iterator[str]:
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if "deleted" in target and "/features" in target:
            yield target


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at the files of this process")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_fit_that_is_cut_leaves_nothing_and_goes_on(error, tmp_path):
    wanted, _ = trained(NORMS)
    folder, loader = tmp_path / "features", DataLoader(data(NORMS), SIZE)
    folder.mkdir()
    program = locc.compile(
        copy.deepcopy(NORMS),
        "dgl",
        ["a", "b"],
        seed=1,
        verify=False,
        schedule="sequential",
        features=folder,
    )
    raised = None
    try:
        program.fit(loader, epochs=3, progress=False, callbacks=[Stop(error)])
    except RuntimeError as found:
        raised = found  # and with it what was in use where it was raised
    assert (raised is None) == (error is KeyboardInterrupt)
    assert program.features is None
    assert not list(_unnamed())
    assert not list(folder.iterdir())
    history = program.fit(loader, epochs=3, progress=False)
    assert same(wanted, snapshot(program.root))
    assert [epoch.reused for epoch in history.epochs] == [0.0, 12 / SAMPLES, 0.0, 1.0, 1.0]


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "memroy"}, "features='memroy' is neither 'memory' nor 'disk' nor an existing folder"),
        (
            {"features": "memory", "features_limit": "2 boxes"},
            "features_limit='2 boxes': give a number of bytes",
        ),
        ({"features": "memory", "features_limit": 0}, "features_limit=0: give a number of bytes above 0"),
        (
            {"features_limit": "2GiB"},
            "features_limit='2GiB' is how much features= keeps, and that is not given",
        ),
        (
            {"features": "memory", "schedule": "lockstep"},
            r"with method 'dgl', schedule='lockstep' and 3 module\(s\) none rests; use schedule='sequential'",
        ),
        ({"features": "disk", "schedule": "wave"}, "which schedule='wave' does not do"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(locc.LoccError, match=message):
        trained(NORMS, **options)


# ---- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [2**31, "2GiB", "2 gib", "2147483648", "2097152KiB"])
def test_a_size_is_a_number_of_bytes(text):
    assert records.size_of(text) == 2**31


@pytest.mark.parametrize(
    ("value", "dim"),
    [
        (torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), 0),
        (torch.randn(3, 4, 2), 1),
        (torch.randn(4, 3, 2).transpose(0, 1), 1),
        (torch.randn(12, 2).bfloat16(), 0),
        (torch.randint(9, (4,)), 0),
        (torch.randn(4, 2) > 0, 0),
    ],
)
def test_what_is_put_together_lies_as_it_did(value, dim):
    layout = Layout.of(value, dim, 4)
    found = layout.together(layout.apart(value, 4).clone())
    assert torch.equal(found, value)
    assert found.dtype == value.dtype
    assert found.stride() == value.stride()
    one = layout.together(layout.apart(value, 4)[2:3])
    each = value.shape[dim] // 4
    assert torch.equal(one, value.narrow(dim, 2 * each, each))


def test_rows_lie_along_the_one_dimension_that_is_the_batch():
    b, f32 = BatchDim(), torch.float32
    assert row_dim(TensorSpec((3, b), f32)) == 1
    assert row_dim(TensorSpec((BatchDim(2), 3), f32)) == 0
    for shape in ((), (3,), (b, b), (BatchDim(1, 1), 3)):
        assert row_dim(TensorSpec(shape, f32)) is None
    assert row_dim(None) is None
