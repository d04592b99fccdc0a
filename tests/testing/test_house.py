"""The kit stays optional, and the property tests use it as a user does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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
    public = ("__future__", "collections.abc", "dataclasses", "locc", "locc.ir", "locc.testing")
    return name in public or name.split(".")[0] in packages


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "property").glob("*.py")), ids=lambda p: p.name)
def test_property_tests_use_the_public_kit_alone(path: Path) -> None:
    assert not [name for name in imported(path) if not allowed(name)]


def private(names: set[str]) -> set[str]:
    """Return the parts of the kit that only its own tests may look into."""
    return {name for name in names if name.startswith("locc.testing.")}


JUDGES = [ROOT / "tests" / "mutants" / "lowering.py"]
"""What judges the kit's own assertions, by running plans and programs as they do."""


def test_our_own_suite_uses_the_public_kit() -> None:
    own = [*(ROOT / "tests" / "testing").glob("*.py"), *JUDGES]
    users = [p for p in (ROOT / "tests").rglob("*.py") if p not in own]
    assert any("locc.testing" in imported(p) for p in users)
    assert not {p.name: found for p in users if (found := private(imported(p)))}


def test_the_rule_catches_a_look_inside(tmp_path: Path) -> None:
    curious = tmp_path / "curious.py"
    curious.write_text("from locc.testing import cases\nfrom locc.testing.alone import Whole\n")
    assert private(imported(curious)) == {"locc.testing.alone"}


def test_the_rule_catches_a_stray_import(tmp_path: Path) -> None:
    stray = tmp_path / "stray.py"
    stray.write_text(
        "import torch\nfrom locc.testing import cases\nfrom locc.proof import prove\nimport support\n"
    )
    assert {name for name in imported(stray) if not allowed(name)} == {"locc.proof", "support"}


@pytest.mark.parametrize(("package", "home"), [("hypothesis", "strategies.py"), ("pytest", "plugin.py")])
def test_one_file_of_the_kit_needs_it(package: str, home: str) -> None:
    files = (ROOT / "locc").rglob("*.py")
    assert {f.name for f in files if any(n.split(".")[0] == package for n in imported(f))} == {home}
