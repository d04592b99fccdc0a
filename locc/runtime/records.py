"""Records of bytes, kept in memory or in a file without a name."""

from __future__ import annotations

import mmap
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locc.errors import LoccError

MEMORY = "memory"
LIMIT = "2GiB"
"""How many bytes are kept, unless given."""

Bytes = NDArray[np.uint8]


def size_of(text: int | str, option: str = "features_limit") -> int:
    """Return a number of bytes, written as one or as "500MB", "2GiB"; `option` is what it is the value of.

    Raises:
        LoccError: it is neither, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", str(text).strip(), re.IGNORECASE)
    size = 0
    if found and not isinstance(text, bool):
        number, prefix, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index((prefix or " ").upper())))
    if size < 1:
        raise LoccError(f"{option}={text!r}: give a number of bytes above 0, or one such as '{LIMIT}'")
    return size


class Records(Protocol):
    """Keeps records; each goes by what `keep` returned for it."""

    def keep(self, records: Bytes) -> Sequence[Any]:
        """Keep the rows of [n, size]; raises OSError or MemoryError where there is no room."""

    def read(self, names: Sequence[Any], size: int) -> Tensor:
        """Return records of one size as bytes [n, size]."""

    def close(self) -> None:
        """Give the room back."""


class InMemory:
    """Records are rows of the arrays in which they came."""

    def keep(self, records: Bytes) -> list[Bytes]:
        """Keep rows."""
        return list(records)

    def read(self, names: Sequence[Bytes], size: int) -> Tensor:
        """Return rows."""
        return _stacked(names, size)

    def close(self) -> None:
        """Nothing is held here."""


class InFile:
    """Records are written to a file and read where it is mapped into memory.

    They are written by calls, not through the map, so that a full disk is an error of the call. The file has
    no name, so that nothing stays of it however the process ends.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._file = tempfile.TemporaryFile(prefix="locc-features-", dir=folder, buffering=0)  # noqa: SIM115
        self._map: Bytes = np.empty(0, np.uint8)
        self._end = 0

    def keep(self, records: Bytes) -> range:
        """Keep rows; a name is where a row begins."""
        self._file.seek(self._end)
        left = memoryview(records.tobytes())
        while left:
            left = left[self._file.write(left) :]
        first, self._end = self._end, self._end + records.size
        return range(first, self._end, records.shape[1])

    def read(self, names: Sequence[int], size: int) -> Tensor:
        """Return rows."""
        if max(names) + size > len(self._map):
            mapped = mmap.mmap(self._file.fileno(), self._end, access=mmap.ACCESS_READ)
            self._map = np.frombuffer(mapped, np.uint8)
        return _stacked([self._map[at : at + size] for at in names], size)

    def close(self) -> None:
        """Let the file go."""
        self._map = np.empty(0, np.uint8)
        self._file.close()


def _stacked(rows: Sequence[Bytes], size: int) -> Tensor:
    found = torch.empty((len(rows), size), dtype=torch.uint8)  # aligned as kernels like it
    np.stack(rows, out=found.numpy())
    return found
