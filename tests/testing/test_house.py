"""The kit stays optional, and the property tests use it as a user does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import locc.testing

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def allowed(name: str) -> bool:
    packages = ("torch", "hypothesis", "pytest")
    return name in ("__future__", "collections.abc", "locc", "locc.testing") or name.split(".")[0] in packages


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "property").glob("*.py")), ids=lambda p: p.name)
def test_property_tests_use_the_public_kit_alone(path: Path) -> None:
    assert not [name for name in imported(path) if not allowed(name)]


def test_the_rule_catches_a_stray_import(tmp_path: Path) -> None:
    stray = tmp_path / "stray.py"
    stray.write_text(
        "import torch\nfrom locc.testing import cases\nfrom locc.verify import prove\nimport support\n"
    )
    assert {name for name in imported(stray) if not allowed(name)} == {"locc.verify", "support"}


@pytest.mark.parametrize(("package", "home"), [("hypothesis", "strategies.py"), ("pytest", "plugin.py")])
def test_one_file_of_the_kit_needs_it(package: str, home: str) -> None:
    files = (ROOT / "locc").rglob("*.py")
    assert {f.name for f in files if any(n.split(".")[0] == package for n in imported(f))} == {home}


def test_everything_public_is_there() -> None:
    for name in locc.testing.__all__:
        assert getattr(locc.testing, name) is not None
