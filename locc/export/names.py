"""Names of inputs and outputs in the user's own words, spelled as ONNX asks: as C identifiers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from locc.ir import TrainingGraph
from locc.lower.inference import flat_outputs

Path = tuple[tuple[str, Any], ...]
"""Steps into a nested value: ("item", key) or ("attr", name)."""


def identifier(text: str) -> str:
    """Return `text` with everything that no C identifier may hold replaced by underscores."""
    clean = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "value"
    return f"_{clean}" if clean[0].isdigit() else clean


def unique(names: Iterable[str], taken: Iterable[str] = (), mark: str = "") -> list[str]:
    """Return the names as distinct identifiers that differ from `taken`; `mark` is put on a clash first."""
    used, result = set(taken), []
    for name in names:
        base = identifier(name)
        if base in used and mark:
            base = f"{base}_{mark}"
        candidate, number = base, 1
        while candidate in used:
            candidate, number = f"{base}_{number}", number + 1
        used.add(candidate)
        result.append(candidate)
    return result


def input_names(ir: TrainingGraph) -> list[str]:
    """Return the names of the input tensors: the forward's argument names, with keys for nested ones."""
    return unique(ir.captured.signature.names)


def output_paths(ir: TrainingGraph) -> list[Path]:
    """Return where in the structure that the user's forward returns each flat output stands."""
    rebuild = ir.captured.inference_output or ir.captured.output
    slots = [torch.empty(0) for _ in flat_outputs(ir)]
    where = {id(slot): index for index, slot in enumerate(slots)}
    paths: list[Path] = [()] * len(slots)
    for path, value in _leaves(rebuild.build(list(slots)), ()):
        if id(value) in where:
            paths[where[id(value)]] = path
    return paths


def output_names(ir: TrainingGraph, taken: Iterable[str]) -> list[str]:
    """Return the names of the outputs: dict keys and field names; "output" for a bare tensor."""
    return unique((_spell(path) for path in output_paths(ir)), taken, mark="output")


def follow(path: Path, value: Any) -> Any:
    """Return the part of `value` at `path`."""
    for kind, key in path:
        value = getattr(value, key) if kind == "attr" else value[key]
    return value


def _spell(path: Path) -> str:
    if path and not isinstance(path[0][1], str):
        return "_".join(["output", *(str(key) for _, key in path)])
    return "_".join(str(key) for _, key in path) or "output"


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    for step, child in _children(value):
        yield from _leaves(child, (*path, step))
    if not _children(value):
        yield path, value


def _children(value: Any) -> list[tuple[tuple[str, Any], Any]]:
    if isinstance(value, Mapping):
        return [(("item", key), child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(("attr", name), getattr(value, name)) for name in value._fields]
    if isinstance(value, (tuple, list)):
        return [(("item", i), child) for i, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return [(("attr", f.name), getattr(value, f.name)) for f in fields if hasattr(value, f.name)]
    return []
