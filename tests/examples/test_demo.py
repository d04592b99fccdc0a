"""The demo, as a stranger sees it who pipes it into a file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_prints_a_page_and_names_the_files_that_hold_the_rest(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "examples.demo",
        "--epochs",
        "1",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) <= 40, done.stdout
    assert max(len(line.replace(str(tmp_path), "out")) for line in lines) <= 120
    named = {Path(path) for path in re.findall(rf"{re.escape(str(tmp_path))}\S+", done.stdout)}
    assert named == set(tmp_path.iterdir())
    assert {path.name for path in named} == {
        f"{method}.{end}" for method in ("bp", "dtp", "predsim") for end in ("txt", "onnx")
    }
    assert sum("4 of 4 checks held" in line for line in lines) == 3
