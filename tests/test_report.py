"""`program.report`: a page of a program and its training."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from xml.dom import minidom

import pytest
from torch import nn

import locc
from locc import LoccError, RunError
from locc.runtime.history import Epoch, History
from support import batch, compiled, mlp

X, Y = batch()


def read(path: Path) -> minidom.Document:
    return minidom.parseString(path.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>"))


def text(node: minidom.Node) -> str:
    own = node.data if isinstance(node, minidom.Text) else ""
    return own + "".join(map(text, node.childNodes))


def test_a_page_names_modules_and_has_a_point_for_each_pass(tmp_path):
    program = compiled(mlp(), "dtp", ["relu1"])
    history = program.fit([(X, Y)], 3, validation=[(X, Y)], progress=False)
    page = read(program.report(tmp_path / "run.html"))
    charts = {text(c.getElementsByTagName("title")[0]): c for c in page.getElementsByTagName("svg")}
    passes = [epoch for epoch in history.epochs if epoch.loss is not None]
    for name in (*passes[-1].objectives, "loss", "validation_accuracy"):
        seen = [epoch for epoch in history.epochs if name in epoch.metrics]
        lines = [line.getAttribute("points") for line in charts[name].getElementsByTagName("polyline")]
        assert [len(line.split()) for line in lines] == [len(seen), len(history.epochs)][: len(lines)]
        assert len(lines) == (2 if name == "loss" else 1)
    tables = [text(row) for row in page.getElementsByTagName("tr")]
    assert all(any(row.startswith(owner) for row in tables) for owner in program.ir.owners)
    assert str(program.ir) in text(page)
    assert list(tmp_path.iterdir()) == [tmp_path / "run.html"]


def test_a_point_lies_where_its_value_is(tmp_path):
    program = compiled(mlp(), "dgl", ["relu1"])
    values = (1.0, float("nan"), 3.0, 2.0)
    program.history = History([Epoch(i, None, v, {}, 0.1) for i, v in enumerate(values)])
    page = read(program.report(tmp_path / "run.html"))
    lines = [line.getAttribute("points").split() for line in page.getElementsByTagName("polyline")]
    assert [len(line) for line in lines] == [1, 2]  # what is not finite is a gap, and is said
    assert "not finite at 1" in text(page)
    points = [tuple(map(float, point.split(","))) for line in lines for point in line]
    (x0, y0), (x2, y2), (x3, y3) = points
    assert x2 - x0 == pytest.approx(2 * (x3 - x2), abs=0.11)
    assert y0 > y3 > y2
    assert y0 - y3 == pytest.approx(y3 - y2, abs=0.11)


def test_names_cannot_break_the_page(tmp_path):
    class Odd(nn.Sequential):
        pass

    Odd.__name__, name = "<b>&Odd", "<script>alert('a')</script>&\""
    program = compiled(Odd(OrderedDict({name: nn.Linear(4, 8), "out": nn.Linear(8, 3)})), "dgl", [name])
    program.fit([(X, Y)], 1, progress=False)
    page = read(program.report(tmp_path / "run.html"))
    assert text(page.getElementsByTagName("h1")[0]) == "dgl on <b>&Odd"
    assert not page.getElementsByTagName("script")
    assert f"{name}.loss" in {text(svg.firstChild) for svg in page.getElementsByTagName("svg")}


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    program = compiled(mlp(), "dgl", ["relu1"])
    with pytest.raises(
        LoccError, match=re.escape(f"the folder '{tmp_path / 'no'}' does not exist; create it")
    ):
        program.report(tmp_path / "no" / "run.html")
    (tmp_path / "run.html").mkdir()
    for folder in (tmp_path / "run.html", "."):
        with pytest.raises(LoccError, match="it is a folder"):
            program.report(folder)
    with pytest.raises(LoccError, match=r"cannot write the report .* too long"):
        program.report(tmp_path / f"{'x' * 255}")
    (tmp_path / "file").touch()
    with pytest.raises(LoccError, match="does not exist"):
        program.report(tmp_path / "file" / "run.html")
    with pytest.raises(LoccError, match="found list"):
        program.report(tmp_path / "new.html", [])
    assert {path.name for path in tmp_path.iterdir()} == {"run.html", "file"}


def test_a_page_says_what_was_asked_for(tmp_path):
    program = compiled(mlp(), locc.method("dtp", sigma=0.25), ["relu1", "relu2"], seed=3, clip=2.0)
    page = read(program.report(tmp_path / "run.html"))
    rows = [[text(cell) for cell in row.childNodes] for row in page.getElementsByTagName("tr")]
    told = {row[0]: row[1] for row in rows}
    assert "Difference target propagation" in told["method"]
    assert "sigma=0.25" in told["its options"]
    assert (told["splits"], told["seed"], told["further settings"]) == ("relu1, relu2", "3", "clip=2.0")
    ((_, objective, count, network, receives, sends, *_),) = [r for r in rows if "relu2.inverse" in r[0]]
    assert objective == "relu2.inverse.reconstruction"
    assert count in network  # it has no parameters beside those of its network
    assert "from relu2" in receives
    assert "to relu1" in sends


def test_another_history_may_be_drawn_and_one_rank_writes(tmp_path):
    program = compiled(mlp(), "dgl", ["relu1"])
    assert "no curves" in text(read(program.report(tmp_path / "run.html")))
    page = read(program.report(tmp_path / "run.html", History([Epoch(1, None, 0.5, {}, 0.1)])))
    assert len(page.getElementsByTagName("polyline")) == 1
    program.member = SimpleNamespace(ranks=SimpleNamespace(leads=False))
    program.report(tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_only_what_was_proved_has_a_page(tmp_path):
    program = compiled(mlp(), "dgl", ["relu1"], verify=False)
    with pytest.raises(RunError, match="verify=False"):
        program.report(tmp_path / "run.html")
    locc.verify(program)
    program.report(str(tmp_path / "run.html"))
