"""One ONNX file per module, and a manifest that chains them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx

from locc import files
from locc.errors import ExportError
from locc.export.chain import FORMAT, VERSION, read_manifest, run_chain
from locc.export.compare import agree, difference, to_numpy
from locc.export.exporters import Options, Written, write
from locc.export.files import publish, staging
from locc.export.names import unique
from locc.export.network import Network, graph_module
from locc.export.proto import digest
from locc.export.samples import Sample, buffers_kept, inference_mode_of, onnx_shape, spec_of
from locc.export.whole import network_of, properties
from locc.ir import TensorSpec, TrainingGraph
from locc.ir.calls import Interpreter
from locc.lower.inference import Stage, flat_outputs, stage_graph, stages, unmarked
from locc.runtime import Compiled

MANIFEST = "manifest.json"


def export_onnx_modules(
    program: Compiled,
    folder: Path,
    *,
    opset: int | None = None,
    check: bool = True,
    tolerance: float | None = None,
    exporter: str | None = None,
    external_data: bool | None = None,
) -> Path:
    """Write one ONNX file per module, `NN_<module>.onnx`, and the manifest that chains them.

    NN is the place in the chain. A module to which a value returns (a method that folds the network up
    and down again) has a file for each of its turns. `locc.export.run_manifest` runs the chain.

    Args:
        program: a complete program, in any mode; it is left as it was.
        folder: where the files go; it is made if its parent exists. Files of an earlier export to the
            same folder are replaced, any other file there stays.
        opset: as for `export_onnx`.
        check: compare every file, and the whole chain, with PyTorch at three batch sizes.
        tolerance: as for `export_onnx`.
        exporter: as for `export_onnx`.
        external_data: as for `export_onnx`.

    Returns:
        The path of the manifest, `folder/manifest.json`.

    Raises:
        ExportError: a file cannot be written, a value between modules is no tensor, or a result
            differs from PyTorch; the folder is then as it was.
    """
    options = Options(opset, check, tolerance, exporter, external_data)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"cannot export to '{folder}': it is a file; give a folder")
    with staging(folder if folder.is_dir() else folder.parent) as stage_folder:
        with files.keeping(program.settings.files), inference_mode_of(program.root, program):
            manifest, names = _Chain(program, options).write(stage_folder)
        (stage_folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        stale = _earlier_files(folder) - set(names)
        made = not folder.is_dir()
        if made:
            _make(folder)
        try:
            publish(stage_folder, [*names, MANIFEST], folder)
        except ExportError:
            if made:
                folder.rmdir()
            raise
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    return folder / MANIFEST


def _make(folder: Path) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        raise ExportError(f"cannot make the folder '{folder}': {error.strerror or error}") from error


def _earlier_files(folder: Path) -> set[str]:
    """Return the files that an earlier manifest in the folder lists."""
    if not (folder / MANIFEST).is_file():
        return set()
    try:
        _, data = read_manifest(folder)
        names = {name for part in data["modules"] for name in (part["file"], *part.get("data", {}))}
    except (ExportError, KeyError, TypeError, AttributeError):  # not ours, or torn
        return set()
    return {name for name in names if Path(name).name == name}


@dataclass(frozen=True)
class _Value:
    """A value that some file reads: its name, its spec, and where it comes from."""

    name: str
    spec: TensorSpec
    source: dict[str, str]

    def entry(self) -> dict[str, Any]:
        return {"name": self.name, "from": self.source, **_typed(self.spec)}


def _typed(spec: TensorSpec) -> dict[str, Any]:
    return {"shape": onnx_shape(spec), "dtype": str(spec.dtype).removeprefix("torch.")}


class _Chain:
    """The stages of a program, ready to be written one by one."""

    def __init__(self, program: Compiled, options: Options) -> None:
        self.program, self.options = program, options
        self.ir: TrainingGraph = program.ir
        self.whole = network_of(program)
        self.stages = stages(self.ir)
        self.values: dict[fx.Node, _Value] = {}
        inputs = [n for n in self.ir.inference.nodes if n.op == "placeholder"]
        for node, name, spec in zip(inputs, self.whole.inputs, self.whole.input_specs, strict=True):
            self.values[node] = _Value(name, spec, {"input": name})
        self.results = [unmarked(n) for n in flat_outputs(self.ir)]
        self.records = self._record(inputs)
        self.files = self._file_names()
        self._name_values()

    def _record(self, inputs: list[fx.Node]) -> list[dict[fx.Node, Tensor]]:
        """Return the values that cross between stages, for each checked batch and for the traced one."""
        nodes = {n.name: n for stage in self.stages for n in (*stage.reads, *stage.writes)}
        module = fx.GraphModule(self.ir.root, self.ir.inference)
        found = []
        for tensors in (*[s.inputs for s in self.whole.samples], self.whole.trace):
            recorder = Recorder(module, set(nodes))
            with buffers_kept(self.ir.root):
                recorder.run(*[t.clone() for t in tensors])
            record = {nodes[name]: value for name, value in recorder.values.items()}
            record.update(zip(inputs, tensors, strict=True))
            found.append(record)
        return found

    def _file_names(self) -> list[str]:
        width = max(2, len(str(len(self.stages) - 1)))
        names = (re.sub(r"[^\w.-]+", "_", stage.owner) for stage in self.stages)
        return [f"{k:0{width}d}_{name}.onnx" for k, name in enumerate(names)]

    def _name_values(self) -> None:
        """Name what crosses: outputs in the user's words, the rest after what makes it."""
        fixed = dict(zip(self.results, self.whole.outputs, strict=True))
        taken = [*self.whole.inputs, *self.whole.outputs]
        for stage, file in zip(self.stages, self.files, strict=True):
            free = [n for n in stage.writes if n not in fixed]
            names = unique((n.name.removeprefix("model_").strip("_") for n in free), taken)
            taken += names
            named = {**fixed, **dict(zip(free, names, strict=True))}
            for node in stage.writes:
                spec = spec_of(
                    self.ir,
                    {s.point: r[node] for s, r in zip(self.whole.samples, self.records, strict=False)},
                )
                self.values[node] = _Value(named[node], spec, {"file": file, "output": named[node]})

    def write(self, folder: Path) -> tuple[dict[str, Any], list[str]]:
        """Write all files into `folder`; returns the manifest and the files' names."""
        parts, names = [], []
        for stage, file in zip(self.stages, self.files, strict=True):
            try:
                written = write(self._network(stage), folder / file, self.options, self._properties(stage))
            except ExportError as error:
                raise ExportError(f"module '{stage.owner}': {error}") from error
            parts.append(self._entry(stage, file, written, folder))
            names += [n for n in (written.data, file) if n]
        manifest = self._manifest(parts)
        if self.options.check:
            self._check(folder, manifest)
        return manifest, names

    def _properties(self, stage: Stage) -> dict[str, str]:
        return {**properties(self.program), "locc.module": stage.owner}

    def _network(self, stage: Stage) -> Network:
        reads, writes = [self.values[n] for n in stage.reads], [self.values[n] for n in stage.writes]
        *records, trace = self.records
        samples = [
            Sample(s.point, [r[n] for n in stage.reads], [r[n] for n in stage.writes])
            for s, r in zip(self.whole.samples, records, strict=True)
        ]
        return Network(
            module=graph_module(self.ir.root, stage_graph(stage)).eval(),
            inputs=[v.name for v in reads],
            input_specs=[v.spec for v in reads],
            outputs=[v.name for v in writes],
            output_specs=[v.spec for v in writes],
            trace=[trace[n] for n in stage.reads],
            samples=samples,
            dynamic=self.whole.dynamic and any(not isinstance(d, int) for v in reads for d in v.spec.shape),
        )

    def _entry(self, stage: Stage, file: str, written: Written, folder: Path) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "module": stage.owner,
            "file": file,
            "sha256": digest(folder / file),
            "opset": written.opset,
            "exporter": written.exporter,
            "inputs": [self.values[n].entry() for n in stage.reads],
            "outputs": [{"name": self.values[n].name, **_typed(self.values[n].spec)} for n in stage.writes],
        }
        if written.data:
            entry["data"] = {written.data: digest(folder / written.data)}
        return entry

    def _manifest(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        origin = properties(self.program)
        pairs = zip(self.whole.outputs, self.whole.output_specs, self.results, strict=True)
        return {
            "format": FORMAT,
            "version": VERSION,
            "locc": origin["locc.version"],
            "method": origin["locc.method"],
            "graph": origin["locc.graph"],
            "opset": max((part["opset"] for part in parts), default=None),
            "inputs": [
                {"name": n, **_typed(s)}
                for n, s in zip(self.whole.inputs, self.whole.input_specs, strict=True)
            ],
            "outputs": [{"name": n, "from": self._source(node), **_typed(s)} for n, s, node in pairs],
            "modules": parts,
        }

    def _source(self, node: fx.Node) -> dict[str, str]:
        if node not in self.values:
            raise ExportError(
                f"the model returns '{node.target}' itself, which no module computes; use export_onnx"
            )
        return self.values[node].source

    def _check(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Compare the chain's outputs with PyTorch's.

        Raises:
            ExportError: names the output, the difference, the batch size, and the first file that is off.
        """
        for sample, record in zip(self.whole.samples, self.records, strict=False):
            gaps: dict[str, float] = {}

            def watch(
                file: str, found: dict[str, np.ndarray[Any, Any]], record: Any = record, gaps: Any = gaps
            ) -> None:
                stage = self.stages[self.files.index(file)]
                pairs = [(found[self.values[n].name], to_numpy(record[n])) for n in stage.writes]
                gaps[stage.owner] = max(
                    difference(a, b) if a.shape == b.shape else float("inf") for a, b in pairs
                )

            inputs = {n: to_numpy(t) for n, t in zip(self.whole.inputs, sample.inputs, strict=True)}
            outputs = run_chain(folder, manifest, inputs, watch)
            try:
                agree(outputs, self.whole.outputs, sample, self.options.tolerance)
            except ExportError as error:
                off = "; after ".join(f"'{owner}' it is {gap:.1e}" for owner, gap in gaps.items())
                raise ExportError(f"{error}, in the chain of modules (after {off})") from error


class Recorder(Interpreter):
    """Runs the whole inference graph and keeps the values that cross between stages."""

    def __init__(self, module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; a copy is kept, since a later node may change the value in place."""
        result = super().run_node(n)
        if n.name in self.wanted:
            if not isinstance(result, Tensor):
                raise ExportError(
                    f"'{n.name}' leaves module '{n.meta.get('owner')}' but is a {type(result).__name__}, "
                    "which cannot pass between two ONNX files; split elsewhere, or use export_onnx"
                )
            self.values[n.name] = result.detach().clone()
        return result
