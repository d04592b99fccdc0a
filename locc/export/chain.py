"""Runs the files of a per-module export one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from locc.errors import ExportError, nearest
from locc.export.compare import open_session, run_session
from locc.export.proto import digest

FORMAT = "locc-modules"
VERSION = 1

Arrays = dict[str, np.ndarray[Any, Any]]


def run_manifest(manifest: str | Path, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """Run an exported chain of modules in onnxruntime, on the CPU.

    Args:
        manifest: the `manifest.json` that `export_onnx_modules` wrote, or its folder.
        inputs: one array for each input that the manifest names, of the dtype and shape it gives.

    Returns:
        The network's outputs by name.

    Raises:
        ExportError: a file is missing, foreign or changed since the export, or an input does not fit.
    """
    path, data = read_manifest(Path(manifest))
    _check_files(path.parent, data)
    values = _given(data["inputs"], inputs)
    return run_chain(path.parent, data, values)


def run_chain(
    folder: Path, data: dict[str, Any], inputs: Arrays, watch: Callable[[str, Arrays], None] | None = None
) -> Arrays:
    """Run the files of a manifest; `watch` sees each file's name and outputs."""
    made: dict[tuple[str, str], np.ndarray[Any, Any]] = {("", name): value for name, value in inputs.items()}

    def value(source: dict[str, str]) -> np.ndarray[Any, Any]:
        return made["", source["input"]] if "input" in source else made[source["file"], source["output"]]

    last_use = _last_uses(data)
    for number, part in enumerate(data["modules"]):
        feed = {item["name"]: value(item["from"]) for item in part["inputs"]}
        try:
            found = run_session(open_session(folder / part["file"]), feed)
        except ExportError as error:
            raise ExportError(f"module '{part['module']}' ('{part['file']}'): {error}") from error
        if watch is not None:
            watch(part["file"], found)
        made.update({(part["file"], name): array for name, array in found.items()})
        for key in [k for k in made if k[0] and last_use.get(k, -1) <= number]:
            del made[key]
    return {item["name"]: value(item["from"]) for item in data["outputs"]}


def _last_uses(data: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Return after which file each value is needed no more, so that it need not be kept."""
    found: dict[tuple[str, str], int] = {}
    for number, part in enumerate(data["modules"]):
        found.update({_key(item): number for item in part["inputs"]})
    found.update({_key(item): len(data["modules"]) for item in data["outputs"]})
    return found


def _key(item: dict[str, Any]) -> tuple[str, str]:
    source = item["from"]
    return ("", source["input"]) if "input" in source else (source["file"], source["output"])


def read_manifest(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the manifest's path and content.

    Raises:
        ExportError: it is missing or was not written by this version of locc.
    """
    path = path / "manifest.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"cannot read the manifest '{path}': {reason}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ExportError(f"'{path}' is no manifest of locc: its format is not '{FORMAT}'")
    if data.get("version") != VERSION:
        raise ExportError(
            f"'{path}' has version {data.get('version')}; this locc reads version {VERSION}: export again"
        )
    missing = {"inputs", "outputs", "modules"} - set(data)
    if missing:
        raise ExportError(f"'{path}' is torn: it lacks {', '.join(sorted(missing))}; export again")
    return path, data


def _check_files(folder: Path, data: dict[str, Any]) -> None:
    for part in data["modules"]:
        for name, wanted in [(part["file"], part["sha256"]), *part.get("data", {}).items()]:
            if Path(name).name != name:
                raise ExportError(f"the manifest names '{name}', which lies outside its folder")
            if not (folder / name).is_file():
                raise ExportError(f"'{folder / name}', which the manifest names, is missing; export again")
            if digest(folder / name) != wanted:
                raise ExportError(f"'{folder / name}' changed since the manifest was written; export again")


def _given(wanted: list[dict[str, Any]], inputs: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    names = [item["name"] for item in wanted]
    for name in inputs:
        if name not in names:
            raise ExportError(f"there is no input '{name}'; {nearest(name, names)}")
    found: Arrays = {}
    batch: int | None = None
    for item in wanted:
        name = item["name"]
        if name not in inputs:
            raise ExportError(f"input '{name}' is missing; the inputs are {', '.join(names)}")
        array = np.asarray(inputs[name])
        shape = item["shape"]
        fits = array.ndim == len(shape) and all(
            isinstance(d, str) or d == n for d, n in zip(shape, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != item["dtype"]:
            wanted_shape = f"[{', '.join(map(str, shape))}]"
            raise ExportError(
                f"input '{name}' must be {item['dtype']}{wanted_shape}; "
                f"found {array.dtype}{list(array.shape)}"
            )
        sizes = [n for d, n in zip(shape, array.shape, strict=True) if d == "batch"]
        if sizes and batch is not None and sizes[0] != batch:
            raise ExportError(f"input '{name}' holds {sizes[0]} samples, and the input before it {batch}")
        batch = sizes[0] if sizes else batch
        found[name] = array
    return found
