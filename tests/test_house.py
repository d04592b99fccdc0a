"""The house rules of docs/architecture.md, held against the imports."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
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


PUBLIC = ("locc", "locc.errors", "locc.ir", "locc.losses", "locc.nn", "locc.rewrite")


def _private(path: Path) -> Iterator[str]:
    """Yield what a method imports that no third party's method could, or should."""
    family = f"locc_passes.{path.parent.name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("locc"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("locc"):
            home = str(node.module)
            if home in PUBLIC:
                module = importlib.import_module(home)
                public = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
                yield from (f"{home}.{a.name}" for a in node.names if a.name not in public)
            elif not _touches({home}, family):
                yield home


def test_a_method_uses_what_every_method_may():
    for path in (ROOT / "passes" / "locc_passes").glob("*/*.py"):
        stray = list(_private(path))
        assert not stray, f"{path.parent.name}/{path.name} imports {stray}; export it from {PUBLIC}"


def test_rewriting_rests_on_the_ir_and_the_builders():
    allowed = (
        "locc.ir",
        "locc.nn",
        "locc.losses",
        "locc.recipes",
        "locc.errors",
        "locc.markers",
        "locc.rewrite",
    )
    for path in (ROOT / "locc" / "rewrite").rglob("*.py"):
        stray = {n for n in _imports(path) if n.startswith("locc") and not n.startswith(allowed)}
        assert not stray, f"{path.name} imports {stray}"
    for path in (ROOT / "locc" / "nn").rglob("*.py"):
        assert not _touches(_imports(path), "locc.rewrite"), f"{path.name} imports locc.rewrite"


def _circles(root: Path, package: str) -> list[list[str]]:
    """Return the files that import each other in a loop, for typing or inside of a function included."""
    names = {".".join(p.relative_to(root).with_suffix("").parts): p for p in (root / package).rglob("*.py")}
    faces = {n for n in names if n.endswith("__init__")}
    graph = nx.DiGraph()
    for name in names.keys() - faces:
        graph.add_edges_from((name, found) for found in _imports(names[name]) & names.keys() if found != name)
    return [sorted(files) for files in nx.strongly_connected_components(graph) if len(files) > 1]


def test_no_files_import_each_other():
    found = _circles(ROOT, "locc")
    assert not found, f"these import each other in a loop: {found}"


def test_a_loop_of_imports_is_seen(tmp_path):
    (tmp_path / "one.py").write_text("from two import b\n")
    (tmp_path / "two.py").write_text("def b():\n    import one\n")
    assert _circles(tmp_path, ".") == [["one", "two"]]


def test_the_rules_catch_a_stray_import(tmp_path):
    stray = tmp_path / "stray.py"
    stray.write_text("from locc import lower\nimport locc_passes.proxy\n")
    assert _touches(_imports(stray), "locc.lower")
    assert _touches(_imports(stray), "locc_passes")
    stray.write_text(
        "from locc.ir.view import DATA\nfrom locc.rewrite import Any\nimport locc_passes.proxy\n"
    )
    assert list(_private(stray)) == ["locc.ir.view", "locc.rewrite.Any", "locc_passes.proxy"]
