"""The benchmark for a GPU runs on the CPU as well, small, so that it runs at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "error: there is no CUDA device here; --device cpu --tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_on_the_cpu(tmp_path: Path) -> None:
    gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "-k", "2", "--json", str(tmp_path / "found")])
    found = json.loads((tmp_path / "found").read_text())
    assert {(row["modules"], row["contestant"]) for row in found["rows"]} == {
        (k, name) for k in (1, 2) for name in ("by hand", "locc, eager")
    }
    assert all(row["peak"] > 0 and row["launches"] > 0 for row in found["rows"])
