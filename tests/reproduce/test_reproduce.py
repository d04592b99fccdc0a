"""Published results: the table, the runner that goes on where it was cut, and the page."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from locc.cli import app
from locc.reproduce import runner, table
from locc.reproduce.data import DATA, Batches, Split, bigram, load
from locc.reproduce.page import page
from locc.reproduce.results import Result, Results
from locc.reproduce.table import Budget, Entry, Row, Setting, entries, select

TINY = Setting(
    "tiny",
    "a tiny network",
    "mnist",
    lambda: nn.Sequential(nn.Sequential(nn.Linear(784, 8), nn.Tanh()), nn.Linear(8, 10)),
    ["0"],
    {"cpu": Budget(1, 20, 60), "full": Budget(3, 20)},
    [Row("bp", published=98.0, source=table.READ), Row("dgl", published=97.0, source=table.RECALLED)],
)


def idx(path: Path, values: torch.Tensor) -> None:
    head = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(head + values.to(torch.uint8).numpy().tobytes()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Files of MNIST with images that are bright in the row of their label, and a table of one setting."""
    monkeypatch.setattr(table, "SETTINGS", (TINY,))
    monkeypatch.setattr("locc.reproduce.page.SETTINGS", (TINY,))
    for part, count in (("train", 200), ("t10k", 50)):
        y = torch.arange(count) % 10
        x = torch.zeros(count, 28, 28).index_put((torch.arange(count), y), torch.tensor(255.0))
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", x)
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", y)
    yield tmp_path
    DATA["mnist"].cache_clear()  # type: ignore[attr-defined]


def reproduce(*args: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["reproduce", *args], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return " ".join((done.stderr if code else done.stdout).split())


def test_a_run_goes_on_at_the_next_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int]] = []
    measure = runner.measure

    def counted(entry: Entry, budget: Budget, seed: int, *rest: object) -> tuple[float | None, str]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((entry.id, seed))
        return measure(entry, budget, seed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "measure", counted)
    file = folder / "results.jsonl"
    asked = ["--seeds", "2", "--data", str(folder), "--results", str(file)]
    reproduce(*asked, code=130)
    assert trained == [("tiny/bp", 0), ("tiny/bp", 1), ("tiny/dgl", 0)]
    file.write_text(file.read_text() + '{"entry": "tiny/dg')  # killed while it wrote
    trained.clear()
    reproduce(*asked, "--page", str(folder / "page.md"))
    assert trained == [("tiny/dgl", 1)]
    reproduce(*asked)
    assert trained == [("tiny/dgl", 1)]
    assert "| `dgl` | 97* | -1.0 |" in (folder / "page.md").read_text()


def test_a_long_training_goes_on_within(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = Results(folder / "whole.jsonl"), Results(folder / "cut" / "cut.jsonl")
    chosen = select(["tiny/dgl"], "full")
    runner.run(chosen, "full", 1, folder, whole)
    passes, drawn = Batches.__iter__, []

    def broken(batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        drawn.append(batches)
        if len(drawn) == 4:  # one pass completes the program, then two are trained
            raise OSError("the disk is gone")
        return passes(batches)

    monkeypatch.setattr(Batches, "__iter__", broken)
    with pytest.raises(OSError, match="gone"):
        runner.run(chosen, "full", 1, folder, cut)
    assert [path.suffix for path in (folder / "cut").iterdir()] == [".safetensors"]
    before = len(drawn)
    runner.run(chosen, "full", 1, folder, cut)
    assert len(drawn) - before < 3
    assert [r.value for r in cut.found.values()] == [r.value for r in whole.found.values()]
    assert [path.suffix for path in (folder / "cut").iterdir()] == [".jsonl"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["tyny/bp"], "there is no entry 'tyny/bp' with the budget 'cpu'; nearest: 'tiny/bp'"),
        (["--budget", "week"], "there is no budget 'week'; there are cpu, full and try"),
        (["--data", "nowhere"], "MNIST is not in 'nowhere': train-images-idx3-ubyte, "),
    ],
)
def test_what_is_missing_is_named(asked: list[str], told: str, folder: Path) -> None:
    assert told in reproduce(*asked, "--results", str(folder / "results.jsonl"), code=2)


def test_a_result_of_another_budget_does_not_count(folder: Path) -> None:
    results = Results(folder / "results.jsonl")
    results.add(Result("tiny/bp", "cpu", "9 epochs of all samples", 0, 50.0))
    runner.run(select(["tiny/bp"], "cpu"), "cpu", 1, folder, results)
    assert len(results.found) == 2


def test_bigrams_are_counted(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_text("ab" * 2000)
    data = load("shakespeare", tmp_path)
    seen = data.x.numel() / 2  # of each letter
    assert bigram(data) == pytest.approx(-torch.tensor((seen + 1) / (seen + 2)).log().item(), rel=1e-4)


@pytest.mark.parametrize(("batch", "alike"), [(-1, True), (20, False)])
def test_a_full_batch_is_the_same_in_each_pass(batch: int, alike: bool) -> None:
    """What lives on in variables of each sample, as of `bcd3`, starts anew on samples in another order."""
    (entry, *_) = select(["bcd-mlp/bcd3"], "cpu")
    data = Split(torch.randn(40, 3), torch.arange(40), torch.randn(5, 3), torch.arange(5))
    training, _ = runner._batches(data, entry, Budget(1, batch), 0, "cpu")
    one, two = (torch.cat([y for _, y in training]) for _ in range(2))
    assert torch.equal(one, two) == alike


def test_moved_images_are_the_same_images() -> None:
    x = torch.zeros(64, 1, 12, 12)
    x[:, :, 5:7, 5:7] = torch.arange(1.0, 65).reshape(64, 1, 1, 1)
    batches = Batches(x, torch.arange(64), 64, torch.Generator().manual_seed(0), augment=True)
    ((moved, y),) = batches
    assert torch.equal(moved.sum((1, 2, 3)), 4.0 * (y + 1))
    assert len({tuple(image.nonzero()[0].tolist()) for image in moved}) > 20


def test_the_page_tells_what_was_not_measured(tmp_path: Path) -> None:
    text = page(Results(tmp_path / "none.jsonl"))
    assert all(f"`{s.name}`" in text for s in table.SETTINGS if not s.every)
    assert "Not measured (not tried)" in text


@pytest.mark.parametrize("setting", table.SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_begins_with_bp(setting: Setting) -> None:
    assert setting.rows[0].method == "bp"


SHAPES = {"mnist": (784,), "cifar10": (3, 32, 32)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, e in entries().items() if not e.setting.every])
def test_each_entry_trains(name: str) -> None:
    entry = entries()[name]
    kind = torch.float64 if entry.setting.double else torch.float32
    x, y = torch.randn(8, *SHAPES[entry.setting.data], dtype=kind), torch.arange(8)
    batches = Batches(x, y, 8)
    program = runner.trainer(entry, Budget(1, 8), 0, batches, "cpu")
    program.fit(batches, 1, progress=False)
    assert program.steps > 0
