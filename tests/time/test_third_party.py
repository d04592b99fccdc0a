"""The methods in time are written as anybody's are: in a file of under 80 lines, through the public doors."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

METHODS = ("features_replay", "replay_buffer")
DOORS = {"locc", "locc.ir", "locc.rewrite", "locc.nn"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_time_needs_no_private_door(name: str) -> None:
    source = (Path(__file__).parent / f"{name}.py").read_text()
    assert len(source.splitlines()) < 80
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("locc"):
            assert node.module in DOORS
            public = importlib.import_module(str(node.module)).__all__
            assert {alias.name for alias in node.names} <= set(public)
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("locc")]
