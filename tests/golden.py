"""The printed training graph after each pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import locc


def stages(
    folder: Path, patch: pytest.MonkeyPatch, model: nn.Module, *args: Any, **options: Any
) -> dict[str, str]:
    """Compile with dumps into `folder`; returns the text after partition and after each pass, by label."""
    patch.setenv("LOCC_DUMP", str(folder))
    locc.compile(model, *args, **options)
    return {path.stem.split("_", 1)[1]: path.read_text() for path in sorted(folder.glob("*.py"))}
