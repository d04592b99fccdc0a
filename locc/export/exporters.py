"""PyTorch's two exporters behind one call, tried in turn until one gives a file that computes the same.

Neither is trusted: what either gives is compared with PyTorch in onnxruntime. What a comparison at three
sizes cannot show is a decision of Python's on data or sizes, of which a trace knows one side. `torch.export`
refuses these; it makes its graph in a fraction of the time that it takes to write it as ONNX. So the older
exporter, which traces TorchScript and is faster by far, comes first, where the graph of `torch.export` shows
that nothing is decided. It comes last as well, without that condition, for what the other cannot express;
then the user is told.
"""

from __future__ import annotations

import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from locc.errors import ExportError
from locc.export import proto
from locc.export.compare import compare
from locc.export.decompositions import decomposed
from locc.export.network import Network
from locc.export.samples import axis, buffers_kept
from locc.ir import BatchDim, TensorSpec
from locc.ir.spec import FreeDim

EXPORTERS = ("torch.export", "TorchScript")
_DECIDES = (GuardOnDataDependentSymNode.__name__, DataDependentOutputException.__name__)
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Options:
    """How to write a file.

    Attributes:
        opset: the ONNX opset; None for the exporter's own choice.
        check: whether to compare with PyTorch in onnxruntime.
        tolerance: the largest accepted difference; None for 1e-5 in float32, and as much less or more
            as the dtype asks for. It is relative to the largest output where that exceeds 1.
        exporter: None, or the only one of `EXPORTERS` to try.
        external_data: whether the weights go into a file of their own; None where they exceed 1.5
            GB, or are in files now.
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
    external = network.large if options.external_data is None else options.external_data
    options = replace(options, external_data=external)
    for name, attempt in _attempts(network, options):
        for debris in path.parent.glob(f"{path.name}*"):
            debris.unlink()
        try:
            with _quiet(), buffers_kept(network.module):
                attempt(path)
            data = proto.finish(path, network, {**properties, "locc.exporter": name}, external)
            written = _checked(network, path, options, name, data)
        except ExportError as error:
            refusals.append((name, error))
        except Exception as error:  # exporters raise whatever they like
            refusals.append((name, ExportError(_summary(error))))
        else:
            _note_fallback(refusals)
            return written
    raise _all_refused(refusals)


def _attempts(network: Network, options: Options) -> Iterator[tuple[str, Callable[[Path], None]]]:
    @cache
    def exported() -> Any:
        return _exported(network, automatic=False)

    may_trace = options.exporter is None and options.check and not network.large  # a trace copies all weights
    if may_trace and _only_the_batch_varies(network):
        yield EXPORTERS[1], lambda path: _vouched(network, path, options, exported)
    if options.exporter != EXPORTERS[1]:
        yield EXPORTERS[0], lambda path: _export(network, path, options, exported)
    if options.exporter != EXPORTERS[0]:
        yield EXPORTERS[1], lambda path: _torchscript(network, path, options)


def _only_the_batch_varies(network: Network) -> bool:
    """Whether all that varies is compared at three sizes; other dimensions are compared at two."""
    dims = [dim for spec in network.input_specs for dim in spec.shape]
    return not any(isinstance(d.scale if isinstance(d, BatchDim) else d, FreeDim) for d in dims)


def _vouched(network: Network, path: Path, options: Options, exported: Callable[[], Any]) -> None:
    """Write what TorchScript traces, if `torch.export` takes the model and its graph decides nothing."""
    for node in exported().graph.nodes:
        if not _straight(node):
            raise ExportError(f"a trace may lose what '{node.name}' depends on")
    _torchscript(network, path, options)


def _straight(node: fx.Node) -> bool:
    """Whether a trace at one size holds for all: no inner graph, no number but sums and products of sizes.

    A constant in the place of these is wrong at another size, where a comparison shows it.
    """
    if node.op == "call_function" and isinstance(node.meta.get("val"), _NUMBERS):
        of_input = node.target is torch.ops.aten.sym_size.int and node.all_input_nodes[0].op == "placeholder"
        return of_input or node.target in (operator.add, operator.sub, operator.mul, operator.neg)
    return node.op != "get_attr"


def _export(network: Network, path: Path, options: Options, exported: Callable[[], Any]) -> None:
    try:
        found = exported()
    except Exception:  # sizes that are not quite what their specs say, or whatever it raises
        if not network.dynamic:
            raise
        found = _exported(network, automatic=True)
    program: Any = torch.onnx.export(
        decomposed(found),
        (),
        dynamo=True,
        verbose=False,
        opset_version=options.opset,
        input_names=proto.temporary("input", network.inputs),
        output_names=proto.temporary("output", network.outputs),
    )
    program.save(path, external_data=options.external_data)


def _exported(network: Network, automatic: bool) -> Any:
    batch = torch.export.Dim("batch")
    shapes = (
        tuple(_dynamic(spec, batch, automatic) for spec in network.input_specs) if network.dynamic else None
    )
    return torch.export.export(network.module, tuple(network.trace), dynamic_shapes=shapes, strict=False)


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
    with patch.object(torch._C, "_jit_onnx_log", lambda *_: None):  # it prints the whole graph on failure
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


def _note_fallback(refusals: list[tuple[str, ExportError]]) -> None:
    refused = [error for name, error in refusals if name == EXPORTERS[0]]
    if refused:
        used, other, reason = EXPORTERS[1], EXPORTERS[0], str(refused[0]).splitlines()[0]
        if reason.startswith(_DECIDES):
            reason += (
                ". The model decides on data there, and a trace holds the side that the example inputs take: "
                "compare the file on your own data, or export a model without that decision"
            )
        warnings.warn(
            f"exported by the {used} exporter, since the one built on {other} failed: {reason}", stacklevel=4
        )


def _all_refused(refusals: list[tuple[str, ExportError]]) -> ExportError:
    reasons = dict(sorted(refusals, key=lambda refusal: EXPORTERS.index(refusal[0])))
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
