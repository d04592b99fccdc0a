"""Runs ONNX files in onnxruntime and compares them with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from locc.errors import ExportError
from locc.export.network import Network
from locc.export.samples import Sample

TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
    torch.complex64: 1e-5,
    torch.complex128: 1e-9,
}
PROVIDER = "CPUExecutionProvider"


def open_session(path: Path, weights: Mapping[str, Any] | None = None) -> Any:
    """Return an onnxruntime session on the CPU.

    It reads `weights`, if there are any, where they lie, and keeps nothing made of them; they have to live as
    long as it does.

    Raises:
        ExportError: onnxruntime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads that spin take the processor from whatever else runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for name, weight in weights.items():
            options.add_initializer(name, weight)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime's errors have no common base below Exception
        raise ExportError(f"onnxruntime refuses '{path.name}': {_first_line(error)}") from error
    if session.get_providers() != [PROVIDER]:
        raise ExportError(f"onnxruntime runs on {session.get_providers()} where {PROVIDER} was asked for")
    return session


def run_session(session: Any, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the outputs of a session by name.

    Raises:
        ExportError: onnxruntime cannot run the file on these inputs.
    """
    names = [output.name for output in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    try:
        values = session.run(names, {name: value for name, value in inputs.items() if name in taken})
    except Exception as error:  # as above
        raise ExportError(f"onnxruntime fails: {_first_line(error)}") from error
    return dict(zip(names, values, strict=True))


def compare(path: Path, network: Network, tolerance: float | None) -> float:
    """Run a file on the network's samples and return the largest difference.

    Raises:
        ExportError: names the first output that differs, by how much, and the batch size.
    """
    weights = weights_beside(path)
    session = open_session(path, weights)
    worst = 0.0
    for sample in network.samples:
        inputs = {name: to_numpy(t) for name, t in zip(network.inputs, sample.inputs, strict=True)}
        try:
            found = run_session(session, inputs)
        except ExportError as error:
            raise ExportError(f"at {sample.text}, {error}") from error
        worst = max(worst, agree(found, network.outputs, sample, tolerance))
    return worst


def weights_beside(path: Path) -> dict[str, Any]:
    """Return the weights that a model has in another file, mapped, where NumPy knows their dtype."""
    found = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        if (
            tensor.data_location == onnx.TensorProto.EXTERNAL
            and dtype.isbuiltin == 1
            and 0 not in tensor.dims
        ):
            place = {entry.key: entry.value for entry in tensor.external_data}
            file, offset = path.parent / place["location"], int(place.get("offset", 0))
            lying = np.memmap(file, dtype, "r", offset, tuple(tensor.dims))
            found[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(lying)
    return found


def agree(
    found: dict[str, np.ndarray[Any, Any]], names: list[str], sample: Sample, tolerance: float | None
) -> float:
    """Return the largest difference between onnxruntime's outputs and PyTorch's.

    Raises:
        ExportError: an output differs by more than the tolerance, or in shape or dtype.
    """
    worst = 0.0
    for name, expected in zip(names, sample.outputs, strict=True):
        where = f"output '{name}' at {sample.text}"
        value = found[name]
        wanted = to_numpy(expected)
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise ExportError(
                f"{where} is {value.dtype}{list(value.shape)} in onnxruntime and "
                f"{wanted.dtype}{list(wanted.shape)} in PyTorch"
            )
        limit = TOLERANCES.get(expected.dtype, 0.0) if tolerance is None else tolerance
        gap = difference(value, wanted)
        if not gap <= limit:
            raise ExportError(f"{where} differs from PyTorch by {gap:.1e}, more than {limit:g}")
        worst = max(worst, gap)
    return worst


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Return the largest difference, relative to the largest finite element of `other` where that exceeds 1.

    It is infinite where only one of the two is finite, and for unequal integers.
    """
    if not (np.issubdtype(other.dtype, np.inexact)):
        return 0.0 if np.array_equal(one, other) else float("inf")
    a, b = one.astype(np.result_type(one, np.float64)), other.astype(np.result_type(other, np.float64))
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(1.0, float(np.abs(b[finite]).max())))


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's values as an array.

    Raises:
        ExportError: NumPy has no such dtype (bfloat16).
    """
    try:
        return np.ascontiguousarray(tensor.detach().cpu().numpy()).reshape(tuple(tensor.shape))
    except TypeError as error:
        raise ExportError(
            f"a value of dtype {tensor.dtype} cannot be compared in onnxruntime; export a float32 copy of "
            "the model, or pass check=False"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
