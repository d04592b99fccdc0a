"""Puts finished files in their place: all of them or none, and never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from locc.errors import ExportError


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield an empty folder on the file system of `folder`, and remove it on exit.

    Raises:
        ExportError: `folder` does not exist or cannot be written.
    """
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise ExportError(f"cannot export to '{folder}': it {kind}; create it first")
    try:
        name = tempfile.mkdtemp(dir=folder, prefix=".locc-")
    except OSError as error:
        raise ExportError(f"cannot export to '{folder}': {error.strerror or error}") from error
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def publish(source: Path, names: list[str], folder: Path) -> None:
    """Move the files `names` from `source` into `folder`, in this order; on failure, undo all of it.

    Raises:
        ExportError: the system refuses one of them; the folder is then as it was.
    """
    kept = source / "replaced"
    kept.mkdir()
    done: list[tuple[Path, Path | None]] = []
    try:
        for name in names:
            target, backup = folder / name, kept / name
            with open(source / name, "rb") as file:
                os.fsync(file.fileno())
            old = target.is_file()
            if old:
                _keep(target, backup)
            os.replace(source / name, target)
            done.append((target, backup if old else None))
    except OSError as error:
        for target, previous in reversed(done):
            if previous is None:
                target.unlink()
            else:
                os.replace(previous, target)
        raise ExportError(f"cannot write '{folder / name}': {error.strerror or error}") from error


def _keep(target: Path, backup: Path) -> None:
    try:
        os.link(target, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(target, backup)
