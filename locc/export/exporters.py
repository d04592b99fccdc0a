"""PyTorch's two exporters behind one call, tried in turn until one gives a file that computes the same.

The exporter built on `torch.export` comes first: it is the maintained one, and keeps symbolic shapes exactly.
What it refuses goes to the older one, which traces TorchScript. Neither is trusted: what either gives is
compared with PyTorch in onnxruntime.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import torch

from locc.errors import ExportError
from locc.export import proto
from locc.export.compare import compare
from locc.export.decompositions import decomposed
from locc.export.network import Network
from locc.export.samples import axis, buffers_kept
from locc.ir import BatchDim, TensorSpec
from locc.ir.spec import FreeDim

EXPORTERS = ("torch.export", "TorchScript")


@dataclass(frozen=True)
class Options:
    """How to write a file.

    Attributes:
        opset: the ONNX opset; None for the exporter's own choice.
        check: whether to compare with PyTorch in onnxruntime.
        tolerance: the largest accepted difference; None for 1e-5 in float32, and as much less or more
            as the dtype asks for. It is relative to the largest output where that exceeds 1.
        exporter: None, or the only one of `EXPORTERS` to try.
        external_data: whether the weights go into a file of their own; None when they exceed 1.5 GB.
    """

    opset: int | None = None
    check: bool = True
    tolerance: float | None = None
    exporter: str | None = None
    external_data: bool | None = None

    def __post_init__(self) -> None:
        newest = onnx.defs.onnx_opset_version()
        if self.opset is not None and not (isinstance(self.opset, int) and 7 <= self.opset <= newest):
            raise ExportError(f"opset={self.opset!r}: give a number from 7 to {newest}, or None")
        if self.exporter is not None and self.exporter not in EXPORTERS:
            raise ExportError(
                f"exporter={self.exporter!r}: choose one of {', '.join(map(repr, EXPORTERS))}, or None"
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise ExportError(f"tolerance={self.tolerance!r}: give a number above 0")


@dataclass(frozen=True)
class Written:
    """What was written: the exporter, the opset, the data file if any, and the largest difference found."""

    exporter: str
    opset: int
    data: str | None
    difference: float


def write(network: Network, path: Path, options: Options, properties: dict[str, str]) -> Written:
    """Write `network` to `path`, in a folder where nothing else is.

    Raises:
        ExportError: no exporter gives a valid file that computes the same; says why for each.
    """
    refusals: list[tuple[str, ExportError]] = []
    for name, attempt in _attempts(network, options):
        for debris in path.parent.glob(f"{path.name}*"):
            debris.unlink()
        try:
            with _quiet(), buffers_kept(network.module):
                attempt(path)
            data = proto.finish(path, network, {**properties, "locc.exporter": name}, options.external_data)
            written = _checked(network, path, options, name, data)
        except ExportError as error:
            refusals.append((name, error))
        except Exception as error:  # exporters raise whatever they like
            refusals.append((name, ExportError(_summary(error))))
        else:
            _note_fallback(refusals, name)
            return written
    raise _all_refused(refusals)


def _attempts(network: Network, options: Options) -> Iterator[tuple[str, Callable[[Path], None]]]:
    if options.exporter != EXPORTERS[1]:
        yield EXPORTERS[0], lambda path: _export(network, path, options, automatic=False)
        if network.dynamic:
            yield EXPORTERS[0], lambda path: _export(network, path, options, automatic=True)
    if options.exporter != EXPORTERS[0]:
        yield EXPORTERS[1], lambda path: _torchscript(network, path, options)


def _export(network: Network, path: Path, options: Options, automatic: bool) -> None:
    batch = torch.export.Dim("batch")
    shapes = (
        tuple(_dynamic(spec, batch, automatic) for spec in network.input_specs) if network.dynamic else None
    )
    exported = torch.export.export(network.module, tuple(network.trace), dynamic_shapes=shapes, strict=False)
    program: Any = torch.onnx.export(
        decomposed(exported),
        (),
        dynamo=True,
        verbose=False,
        opset_version=options.opset,
        input_names=proto.temporary("input", network.inputs),
        output_names=proto.temporary("output", network.outputs),
    )
    program.save(path, external_data=options.external_data)


def _dynamic(spec: TensorSpec, batch: Any, automatic: bool) -> dict[int, Any]:
    dims: dict[int, Any] = {}
    for i, dim in enumerate(spec.shape):
        if isinstance(dim, FreeDim) or (isinstance(dim, BatchDim) and isinstance(dim.scale, FreeDim)):
            dims[i] = torch.export.Dim.AUTO
        elif isinstance(dim, BatchDim):
            scaled = batch if dim.scale == 1 else dim.scale * batch
            exact = scaled if dim.offset == 0 else scaled + dim.offset
            dims[i] = torch.export.Dim.AUTO if automatic else exact
    return dims


def _torchscript(network: Network, path: Path, options: Options) -> None:
    inputs = proto.temporary("input", network.inputs)
    axes = {
        name: {i: re.sub(r"\W", "_", axis(d)) for i, d in enumerate(spec.shape) if not isinstance(d, int)}
        for name, spec in zip(inputs, network.input_specs, strict=True)
    }
    log = getattr(torch._C, "_jit_set_onnx_log_enabled", None)
    if log is not None:
        log(False)  # it prints the whole graph on failure
    torch.onnx.export(
        network.module,
        tuple(network.trace),
        str(path),
        dynamo=False,
        opset_version=options.opset,
        input_names=inputs,
        output_names=proto.temporary("output", network.outputs),
        dynamic_axes={k: v for k, v in axes.items() if v} if network.dynamic else None,
    )


def _checked(network: Network, path: Path, options: Options, exporter: str, data: str | None) -> Written:
    onnx.checker.check_model(str(path), full_check=True)
    opset = proto.opset_of(path)
    if options.opset is not None and opset != options.opset:
        raise ExportError(f"it writes opset {opset} where {options.opset} was asked for")
    difference = compare(path, network, options.tolerance) if options.check else float("nan")
    return Written(exporter, opset, data, difference)


def _note_fallback(refusals: list[tuple[str, ExportError]], used: str) -> None:
    others = [(name, error) for name, error in refusals if name != used]
    if others:
        name, error = others[0]
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"exported by the {used} exporter, since the one built on {name} failed: {reason}", stacklevel=4
        )


def _all_refused(refusals: list[tuple[str, ExportError]]) -> ExportError:
    reasons = dict(refusals)
    if len(reasons) == 1:
        return next(iter(reasons.values()))
    told = "".join(f"\n  {name}: {error}" for name, error in reasons.items())
    return ExportError(f"no exporter gives an ONNX file that computes what PyTorch does{told}")


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress reports and deprecation notes from the user's terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
