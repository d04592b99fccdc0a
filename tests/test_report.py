"""`program.report`: a page of a program and its training."""

from __future__ import annotations

import re
from pathlib import Path
from xml.dom import minidom

import pytest
from torch import nn

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
    (line,) = read(program.report(tmp_path / "run.html")).getElementsByTagName("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.getAttribute("points").split()]
    (x0, y0), (x2, y2), (x3, y3) = points
    assert x2 - x0 == pytest.approx(2 * (x3 - x2), abs=0.11)
    assert y0 > y3 > y2
    assert y0 - y3 == pytest.approx(y3 - y2, abs=0.11)


def test_names_cannot_break_the_page(tmp_path):
    class Odd(nn.Sequential):
        pass

    Odd.__name__ = "<b>&Odd"
    program = compiled(Odd(nn.Linear(4, 8), nn.Linear(8, 3)), "dgl", ["0"])
    assert text(read(program.report(tmp_path / "run.html")).getElementsByTagName("h1")[0]) == "dgl on <b>&Odd"


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    program = compiled(mlp(), "dgl", ["relu1"])
    with pytest.raises(LoccError, match=re.escape(f"'{tmp_path / 'no' / 'run.html'}': No such file")):
        program.report(tmp_path / "no" / "run.html")
    (tmp_path / "run.html").mkdir()
    with pytest.raises(LoccError, match="cannot write the report"):
        program.report(tmp_path / "run.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


def test_only_what_was_proved_has_a_page(tmp_path):
    program = compiled(mlp(), "dgl", ["relu1"], verify=False)
    with pytest.raises(RunError, match="verify=False"):
        program.report(tmp_path / "run.html")
    assert "no curves" in text(read(compiled(mlp(), "dgl", 2).report(str(tmp_path / "a.html"))))
