"""The house rules of docs/architecture.md, held against the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("capture", "partition", "rewrite", "lower")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _touches(names: set[str], package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in names)


@pytest.mark.parametrize("stage", STAGES)
def test_the_stages_meet_only_in_the_ir(stage):
    for path in (ROOT / "locc" / stage).rglob("*.py"):
        for other in STAGES:
            if other != stage:
                assert not _touches(_imports(path), f"locc.{other}"), f"{path.name} imports locc.{other}"


def test_the_ground_floor_imports_no_stage():
    for path in (ROOT / "locc" / "ir").rglob("*.py"):
        found = {n for n in _imports(path) if n.startswith("locc.")}
        stray = {n for n in found if not n.startswith(("locc.ir", "locc.errors", "locc.markers"))}
        assert not stray, f"{path.name} imports {stray}"


def test_locc_never_imports_the_method_library():
    for path in (ROOT / "locc").rglob("*.py"):
        assert not _touches(_imports(path), "locc_passes"), path


def test_the_rules_catch_a_stray_import(tmp_path):
    stray = tmp_path / "stray.py"
    stray.write_text("from locc import lower\nimport locc_passes.proxy\n")
    assert _touches(_imports(stray), "locc.lower")
    assert _touches(_imports(stray), "locc_passes")
