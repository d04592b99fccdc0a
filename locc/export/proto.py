"""What an exporter wrote, made ours: names, shapes, metadata, and where the weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from locc.export.network import Network
from locc.export.samples import onnx_shape
from locc.ir import TensorSpec


def temporary(kind: str, names: Iterable[str]) -> list[str]:
    """Return names for an exporter to use, which nothing inside a network is called by."""
    return [f"locc_{kind}_{i}" for i, _ in enumerate(names)]


def finish(path: Path, network: Network, properties: dict[str, str], external: bool) -> str | None:
    """Give the file its final form in place; returns the name of its data file, if it has one.

    Inputs and outputs get their names and symbolic shapes, traces of the user's source files are
    removed, and weights in files of their own come to one file, named after its content.
    """
    model = onnx.load(str(path), load_external_data=False)
    _forget_sources(model)
    renamed = dict(zip(temporary("input", network.inputs), network.inputs, strict=True))
    renamed |= dict(zip(temporary("output", network.outputs), network.outputs, strict=True))
    _rename(model.graph, renamed)
    for values, specs in (
        (model.graph.input, network.input_specs),
        (model.graph.output, network.output_specs),
    ):
        by_name = {v.name: v for v in values}
        names = network.inputs if specs is network.input_specs else network.outputs
        for name, spec in zip(names, specs, strict=True):
            if name in by_name and network.dynamic:
                _reshape(by_name[name], spec)
    del model.metadata_props[:]
    for key, value in sorted(properties.items()):
        model.metadata_props.add(key=key, value=value)
    data = _gather(model, path, external)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return data


def opset_of(path: Path) -> int:
    """Return the opset of a file's standard operators."""
    model = onnx.load(str(path), load_external_data=False)
    return int(next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))


def _rename(graph: Any, renamed: dict[str, str]) -> None:
    """Rename values; an inner value whose name a user's word takes gets another one."""
    used = {name for part in _graphs(graph) for name in _values(part)}
    names = dict(renamed)
    for wanted in renamed.values():
        if wanted in used:
            number = 0
            while (fresh := f"{wanted}_inner{number}") in used:
                number += 1
            used.add(fresh)
            names[wanted] = fresh
    for part in _graphs(graph):
        for node in part.node:
            node.input[:] = [names.get(n, n) for n in node.input]
            node.output[:] = [names.get(n, n) for n in node.output]
        for value in (*part.input, *part.output, *part.value_info, *part.initializer):
            value.name = names.get(value.name, value.name)


def _values(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        yield from node.output
    for value in (*graph.input, *graph.output, *graph.initializer):
        yield value.name


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those inside its nodes (the branches of an If, the body of a Loop)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _reshape(value: Any, spec: TensorSpec) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for size in onnx_shape(spec):
        dim = shape.dim.add()
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = size


def _forget_sources(model: Any) -> None:
    """Remove stack traces and paths of the machine that exported."""
    model.doc_string = ""
    for holder in (model.graph, *model.functions):
        holder.doc_string = ""
        del holder.metadata_props[:]
        for part in _graphs(holder) if holder is model.graph else (holder,):
            for node in part.node:
                node.doc_string = ""
                del node.metadata_props[:]
            for value in part.value_info:
                del value.metadata_props[:]
    for value in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]


def _gather(model: Any, path: Path, external: bool) -> str | None:
    """Bring the weights to where they belong: into the model, or into one file beside it."""
    weights = [t for part in _graphs(model.graph) for t in part.initializer]
    files = {_location(t) for t in weights if t.data_location == onnx.TensorProto.EXTERNAL}
    if not files and not external:
        return None
    if len(files) != 1 or any(
        t.data_location != onnx.TensorProto.EXTERNAL and len(t.raw_data) > 1024 for t in weights
    ):
        onnx.load_external_data_for_model(model, str(path.parent))
        for name in files:
            (path.parent / name).unlink()
        name = f"{path.name}.data"
        onnx.convert_model_to_external_data(
            model, all_tensors_to_one_file=True, location=name, size_threshold=0
        )
        onnx.save_model(model, str(path))
        files = {name}
    (name,) = files
    # Named after its content: the file that an earlier export left is not overwritten before its model is.
    final = f"{path.name}.{digest(path.parent / name)[:12]}.data"
    (path.parent / name).rename(path.parent / final)
    for tensor in weights:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = final
    return final


def _location(tensor: Any) -> str:
    return next(str(e.value) for e in tensor.external_data if e.key == "location")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
