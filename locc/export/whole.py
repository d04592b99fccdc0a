"""The inference path as one ONNX file."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from locc import files
from locc.errors import ExportError, LoccError
from locc.export.exporters import Options, write
from locc.export.files import publish, staging
from locc.export.names import input_names, output_names
from locc.export.network import Network, graph_module
from locc.export.samples import Sample, batches, example_tensors, inference_mode_of, resized, spec_of, truth
from locc.runtime import Compiled
from locc.runtime.checkpoint import graph_hash
from locc.version import __version__


def export_onnx(
    program: Compiled,
    path: Path,
    *,
    opset: int | None = None,
    check: bool = True,
    tolerance: float | None = None,
    exporter: str | None = None,
    external_data: bool | None = None,
) -> Path:
    """Write the inference path as one ONNX file, with a dynamic batch.

    Inputs are named after the forward's arguments, outputs after the dict keys or fields of what it
    returns ("output" for a bare tensor); names become C identifiers (`state[0]` is `state_0`). The file's
    metadata hold the method, the digest of the training graph and the exporter.

    Args:
        program: a complete program, in any mode; it is left as it was.
        path: the file to write. The file that is there is replaced once the new one is checked.
        opset: the ONNX opset; None for the exporter's recommended one.
        check: compare with PyTorch in onnxruntime at three batch sizes.
        tolerance: largest accepted difference, relative to the largest output where that exceeds 1;
            None for 1e-5 in float32 (1e-9 in float64, 1e-2 in float16).
        exporter: "torch.export" or "TorchScript", or None to try both: the latter is faster, and is first
            where `torch.export` shows that a trace is enough and `check` compares all that varies; it copies
            all weights, and comes last where they are large.
        external_data: put the weights into a file of their own (`<name>.<digest>.data`); None to do so
            for models of more than 1.5 GB, and for those that `offload=` keeps in files. Then one weight at a
            time is read.

    Returns:
        The path.

    Raises:
        ExportError: the file cannot be written, no exporter can express the model, or the result differs
            from PyTorch; an earlier file stays as it was.
    """
    options = Options(opset, check, tolerance, exporter, external_data)
    path = Path(path)
    if path.is_dir():
        raise ExportError(
            f"cannot export to '{path}': it is a folder; give a file name, such as '{path}/model.onnx'"
        )
    network_properties = properties(program)
    with staging(path.parent) as folder:
        with files.keeping(program.settings.files), inference_mode_of(program.root, program):
            network = network_of(program)
            written = write(network, folder / path.name, options, network_properties)
        old = _data_files(path)
        publish(folder, [n for n in (written.data, path.name) if n], path.parent)
    for name in old - {written.data}:
        (path.parent / name).unlink(missing_ok=True)
    return path


def network_of(program: Compiled) -> Network:
    """Return the whole inference path with the samples it is checked on; the program is in eval mode.

    Raises:
        ExportError: the model fails on its own example inputs.
    """
    ir = program.ir
    run = truth(ir, program)
    example = example_tensors(ir)
    try:
        sizes = batches(ir, run)
        samples = []
        for point in sizes.checked:
            inputs = resized(ir, example, point)
            samples.append(Sample(point, inputs, run(inputs)))
    except LoccError:
        raise
    except Exception as error:  # the user's own code
        raise ExportError(
            f"the model itself fails on its example inputs in eval mode: {type(error).__name__}: {error}"
        ) from error
    names = input_names(ir)
    specs = [spec_of(ir, {s.point: s.outputs[i] for s in samples}) for i in range(len(samples[0].outputs))]
    return Network(
        module=graph_module(ir.root, ir.inference).eval(),
        inputs=names,
        input_specs=list(ir.captured.signature.specs),
        outputs=output_names(ir, names),
        output_specs=specs,
        trace=resized(ir, example, sizes.trace),
        samples=samples,
        dynamic=sizes.dynamic,
    )


def properties(program: Compiled) -> dict[str, str]:
    """Return what every exported file says of its origin."""
    return {"locc.version": __version__, "locc.method": program.method, "locc.graph": graph_hash(program)}


def _data_files(path: Path) -> set[str]:
    """Return the names of the data files that the model file at `path` refers to, as locc names them."""
    if not path.is_file():
        return set()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # whatever stands there, it is no ONNX file of ours
        return set()
    found = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.data")
    return {name for name in found if ours.fullmatch(name)}
