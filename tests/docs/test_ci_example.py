"""The GitHub Actions example works as written, in a project of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import locc

EXAMPLE = Path(__file__).parents[2] / "examples" / "ci"
COMMANDS = re.findall(r"^ +run: (\w.+)$", (EXAMPLE / "locality.yml").read_text(), re.MULTILINE)
EACH = [pytest.param(c, marks=[] if c.startswith("locc") else pytest.mark.slow) for c in COMMANDS]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("model.py", "test_locality.py"):
        shutil.copy(EXAMPLE / name, tmp_path)
    return tmp_path


def _run(command: str, project: Path) -> subprocess.CompletedProcess[str]:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"]}
    return subprocess.run(
        command, shell=True, cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def test_the_workflow_proves_and_tests() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["locc", "pytest"]


@pytest.mark.parametrize("command", EACH)
def test_its_commands_pass(command: str, project: Path) -> None:
    done = _run(command, project)
    assert done.returncode == 0, done.stdout + done.stderr
    if command.startswith("locc"):
        certificate = locc.Certificate.from_json((project / "certificate.json").read_text())
        assert certificate.verdict == "strictly modular"


@pytest.mark.parametrize("command", EACH)
def test_its_commands_fail_where_the_model_leaks(command: str, project: Path) -> None:
    """The same project, with a hook that brings the weight of the stem into a block."""
    path = project / "model.py"
    hook = "        self.blocks[1].register_forward_hook(lambda m, a, h: h + self.stem[1].weight.mean())\n"
    path.write_text(path.read_text().replace("        self.head =", hook + "        self.head ="))
    done = _run(command, project)
    assert done.returncode == 1
    assert "stem.1.weight" in done.stdout + done.stderr
