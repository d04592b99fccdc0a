"""Names that are imported when they are first used (PEP 562): PyTorch takes seconds to load."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package.

    Args:
        package: its `__name__`.
        homes: for each public name, the module that defines it. Submodules are found without it.
    """
    space = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name in homes:
            space[name] = getattr(importlib.import_module(homes[name]), name)
        elif name.startswith("__") or importlib.util.find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        else:
            importlib.import_module(f"{package}.{name}")
        return space[name]

    return get, lambda: sorted({*space, *homes})
