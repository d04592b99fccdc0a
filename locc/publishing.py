"""Puts a finished file in its place: whole, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write; at the end of the block it takes the place of the one at `path`.

    Where anything fails, what was at `path` is as it was, and nothing is left beside it.

    Raises:
        OSError: the system refuses it.
    """
    # Beside the target, not in a temporary folder: only within one file system is a rename atomic.
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield made
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)
    finally:
        with suppress(OSError):
            os.unlink(made)
