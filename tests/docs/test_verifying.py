"""What docs/verifying.md says is so: its code runs, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import locc
from locc.facts import NOT, STRICT, WEAK

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "verifying.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


def _space() -> dict[str, Any]:
    torch.manual_seed(0)
    parts = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    names = ["layer1", "tanh1", "layer2", "tanh2", "head"]
    model = nn.Sequential()
    for name, part in zip(names, parts, strict=True):
        model.add_module(name, part)
    return {"locc": locc, "model": model, "x": torch.randn(5, 4), "y": torch.randint(3, (5,))}


def test_the_first_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space = _space()
    exec(CODE[0], space)
    assert "Certificate of locality: dni" in capsys.readouterr().out
    saved = locc.Certificate.from_json((tmp_path / "certificate.json").read_text())
    assert saved.graph_hash == space["program"].certificate.graph_hash


def test_the_tests_of_the_second_example_pass(locc_program: Any) -> None:
    space = _space()
    exec(CODE[1], space)
    space["test_local"](locc_program)
    space["program"] = locc.compile(space["model"], "dgl", ["layer1"], example_inputs=space["x"])
    space["test_isolated"]()


def test_the_verdicts_of_the_table_are_those_that_compiling_derives() -> None:
    rows = re.findall(
        r"^\| (strictly modular|weakly modular|not modular) \|.*\| ([\w, ]+) \|$", TEXT, flags=re.M
    )
    assert [verdict for verdict, _ in rows] == [STRICT, WEAK, NOT]
    infos = locc.methods()
    for verdict, names in rows:
        for name in names.split(", "):
            assert infos[name].modularity == verdict, name


def test_the_files_and_targets_that_it_names_are_there() -> None:
    for path in re.findall(r"`((?:tests|examples)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = set(re.findall(r"`make (\w+)`", TEXT))
    assert named
    assert named <= set(targets)
