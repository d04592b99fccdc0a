"""Methods of other packages: what cannot be loaded is told, and stands in nobody's way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import locc
from cli.test_cli import run
from locc import registry
from support import mlp

MINE = """
from locc_passes.baseline.bp import BP

PASSES = {
    "mine": "mine:Mine", "gone": "mine:Gone", "failing": "failing:Method", "number": "mine:number",
    "dgl": "mine:Mine",
}
number = 3


class Mine(BP):
    __doc__ = None
"""
FILES = {"mine": MINE, "torn": "import a_module_that_is_not_there", "junk": "PASSES = 3", "failing": "1 / 0"}
BROKEN = {
    "gone": "AttributeError",
    "failing": "ZeroDivisionError: division by zero",
    "number": "not a locc Method class",
    "torn": "No module named 'a_module_that_is_not_there'",
    "junk": "'int' object has no attribute 'items'",
    "dgl": "two packages register the method 'dgl'",
}


@pytest.fixture(autouse=True)
def _plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install packages, as far as an import can tell."""
    for name, source in FILES.items():
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        if name != "failing":
            (info / "entry_points.txt").write_text(f"[locc.passes]\n{name} = {name}:PASSES\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._survey.cache_clear()
    yield
    registry._survey.cache_clear()


def test_what_is_broken_is_listed_with_its_error_and_the_others_work() -> None:
    found = locc.methods()
    assert {name for name, info in found.items() if info.error is not None} == BROKEN.keys()
    for name, message in BROKEN.items():
        assert message in f"{type(found[name].error).__name__}: {found[name].error}"
    assert found["mine"].summary == ""
    for name in ("mine", "bp"):
        locc.compile(mlp(), name, ["relu1"], example_inputs=torch.randn(2, 4))


@pytest.mark.parametrize("name", BROKEN)
def test_asking_for_it_says_why_and_chains_the_cause(name: str) -> None:
    with pytest.raises(locc.MethodError, match=BROKEN[name]) as found:
        locc.method(name)
    assert (found.value.__cause__ is None) == (name == "number")


def test_an_unknown_method_may_be_one_of_a_broken_package() -> None:
    with pytest.raises(
        locc.MethodError, match=r"no method 'minee'; nearest: 'mine'.*; 'torn' cannot be loaded"
    ):
        locc.method("minee")


def test_the_command_line_lists_and_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = run("methods").output.splitlines()
    assert sum("broken" in line for line in lines) == len(BROKEN)
    assert any("predsim" in line for line in lines)
    assert "ModuleNotFoundError: No module named" in run("methods", "torn", code=1).stderr
