"""Reads a safetensors file in place, so that a state larger than memory can be loaded."""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored(Mapping[str, Tensor]):
    """The tensors of a file, by name; each time one is asked for, it is a copy in memory.

    Attributes:
        lying: the tensors where they lie, to be read only: to write to one ends the process. (Those of
            safetensors are writable, for which the system may want memory of the file's size.)
    """

    def __init__(self, lying: dict[str, Tensor]) -> None:
        self.lying = lying

    def __getitem__(self, name: str) -> Tensor:
        """Return a copy."""
        return self.lying[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.lying)

    def __len__(self) -> int:
        return len(self.lying)


def read(path: Path) -> tuple[Stored, dict[str, str]]:
    """Return the tensors of a file and its metadata.

    Raises:
        SafetensorError: the file is torn or of another kind.
        OSError, ValueError: it cannot be read, or has tensors of a dtype that PyTorch does not know.
    """
    with safe_open(path, framework="np") as file:  # checks the header
        metadata = file.metadata() or {}
    with open(path, "rb") as raw, warnings.catch_warnings():
        start = 8 + int.from_bytes(raw.read(8), "little")
        header: dict[str, Any] = json.loads(raw.read(start - 8))
        header.pop("__metadata__", None)
        mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        warnings.simplefilter("ignore")  # that it is not writable
        data = torch.frombuffer(mapped, dtype=torch.uint8)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"'{name}' is of dtype {entry['dtype']}")
        first, end = entry["data_offsets"]
        found[name] = data[start + first : start + end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return Stored(found), metadata
