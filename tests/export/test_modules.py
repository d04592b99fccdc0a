"""One file per module: the chain computes what PyTorch does, and the folder is never left half written."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import fx, nn

import locc
from locc.export import exporters, modules, run_manifest
from locc.export.compare import difference
from locc.lower.inference import stages
from zoo import CASES, Case, find

QUICK = ("two_inputs", "dict_output", "dataclass_output", "hooks", "custom_function", "lstm_state",
         "gru_cells", "tied_functional", "shared_block")  # fmt: skip
FAST = {"exporter": "TorchScript"}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def compiled(splits: Any = ("1", "3"), method: str = "bp") -> locc.Program:
    return locc.compile(mlp(), method, list(splits), example_inputs=torch.randn(5, 6), verify=False)


def elements(path: Path) -> int:
    return sum(int(np.prod(t.dims)) for t in onnx.load(str(path)).graph.initializer)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name", QUICK)
def test_zoo(name: str, tmp_path: Path) -> None:
    program = find(name).compile(-1)
    manifest = json.loads(program.export_onnx_modules(tmp_path / "out", **FAST).read_text())
    names = [owner.name for owner in program.ir.modules]
    assert [part["module"] for part in manifest["modules"]] == names
    assert [part["file"][:3] for part in manifest["modules"]] == [f"{k:02d}_" for k in range(len(names))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in ("branch_in_leaf", "mutable_object")], ids=str
)
def test_whole_zoo(case: Case, tmp_path: Path) -> None:
    assert case.compile(-1).export_onnx_modules(tmp_path / "out").is_file()


@pytest.mark.parametrize("batch", [1, 5, 19])
def test_the_chain_computes_what_pytorch_does(tmp_path: Path, batch: int) -> None:
    program = compiled()
    manifest = program.export_onnx_modules(tmp_path / "out", **FAST)
    x = torch.randn(batch, 6)
    found = run_manifest(manifest, {"input": x.numpy()})
    with torch.no_grad():
        assert difference(found["output"], program.model(x).numpy()) < 1e-5
    assert list(found) == ["output"]


def test_by_the_maintained_exporter(tmp_path: Path) -> None:
    program = find("custom_function").compile(0)
    manifest = json.loads(program.export_onnx_modules(tmp_path / "out", exporter="torch.export").read_text())
    assert {part["exporter"] for part in manifest["modules"]} == {"torch.export"}


def test_manifest(tmp_path: Path) -> None:
    program = compiled(method="dgl")
    path = program.export_onnx_modules(tmp_path / "out", **FAST)
    data = json.loads(path.read_text())
    assert path == tmp_path / "out" / "manifest.json"
    assert (data["format"], data["version"], data["method"]) == ("locc-modules", 1, "dgl")
    assert data["inputs"] == [{"name": "input", "shape": ["batch", 6], "dtype": "float32"}]
    first, second, last = data["modules"]
    assert [p["file"] for p in data["modules"]] == ["00_1.onnx", "01_3.onnx", "02_4.onnx"]
    assert first["inputs"][0]["from"] == {"input": "input"}
    assert second["inputs"][0]["from"] == {"file": "00_1.onnx", "output": first["outputs"][0]["name"]}
    assert second["inputs"][0]["shape"] == ["batch", 8]
    assert data["outputs"][0]["from"] == {"file": "02_4.onnx", "output": "output"}
    weights = [
        sum(int(np.prod(t.dims)) for t in onnx.load(path.parent / p["file"]).graph.initializer)
        for p in data["modules"]
    ]
    assert weights == [6 * 8 + 8, 8 * 8 + 8, 8 * 3 + 3]  # no head of `dgl`
    assert last["opset"] == data["opset"]


def test_a_skip_goes_straight_to_its_reader(tmp_path: Path) -> None:
    data = json.loads(find("unet").compile(1).export_onnx_modules(tmp_path / "out", **FAST).read_text())
    files = [part["file"] for part in data["modules"]]
    sources = [{item["from"].get("file") for item in part["inputs"]} for part in data["modules"]]
    assert any(len(s) > 1 for s in sources)
    assert all(s <= {None, *files[:k]} for k, s in enumerate(sources))


def fold(program: locc.Program) -> None:
    """Rewrite the inference as a method that folds does: up through two modules, and back down."""
    ir = program.ir
    up = ir.add_module("down", nn.Linear(8, 3))
    graph = fx.Graph()
    x = graph.placeholder("input")
    h = graph.call_module("model.0", (x,))
    k = graph.call_module("model.2", (h,))
    back = graph.call_function(operator.add, (k, h))
    y = graph.call_module(up, (back,))
    graph.output((y,))
    first, second = ir.modules[0].name, ir.modules[1].name
    for node, owner in ((x, "data"), (h, first), (k, second), (back, first), (y, first)):
        node.meta.update(owner=owner, role="forward")
    ir.inference, ir.folded = graph, True


def test_a_folded_network_has_a_file_for_each_turn(tmp_path: Path) -> None:
    program = compiled()
    fold(program)
    first, second = program.ir.modules[0].name, program.ir.modules[1].name
    assert [s.owner for s in stages(program.ir)] == [first, second, first]
    manifest = program.export_onnx_modules(tmp_path / "out", **FAST)
    x = torch.randn(3, 6)
    model: Any = program.model
    with torch.no_grad():
        h = model[0](x)
        expected = program.root.aux["down"](model[2](h) + h)
    assert difference(run_manifest(manifest, {"input": x.numpy()})["output"], expected.numpy()) < 1e-5
    whole = program.export_onnx(tmp_path / "whole.onnx", **FAST)
    assert elements(whole) == 6 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3  # model.4 is not part of a folded network


def test_a_part_of_a_structured_value_is_taken_out_by_the_module_that_makes_it(tmp_path: Path) -> None:
    program = find("lstm_state").compile(1)
    last = program.ir.last.name
    parts = [n for n in program.ir.inference.nodes if n.target is operator.getitem]
    assert parts
    for node in parts:
        node.meta["owner"] = last
    assert program.export_onnx_modules(tmp_path / "out", **FAST).is_file()


def test_markers_leave_no_trace(tmp_path: Path) -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(locc.split(torch.relu(self.a(x)), "half"))

    program = locc.compile(Marked(), "bp", [], example_inputs=torch.randn(5, 6), verify=False)
    data = json.loads(program.export_onnx_modules(tmp_path / "out", **FAST).read_text())
    assert [p["file"] for p in data["modules"]] == ["00_half.onnx", "01_b.onnx"]


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, out = compiled(), tmp_path / "out"
    program.export_onnx_modules(out, **FAST)
    (out / "notes.txt").write_text("mine")
    before = content(out)
    right = exporters._torchscript

    def late(network: Any, path: Path, options: Any) -> None:
        if path.name.startswith("02"):
            raise RuntimeError("no such op")
        right(network, path, options)

    monkeypatch.setattr(exporters, "_torchscript", late)
    with pytest.raises(locc.ExportError, match=r"module '4': .*no such op"):
        program.export_onnx_modules(out, **FAST)
    assert content(out) == before
    with pytest.raises(locc.ExportError, match="no such op"):
        program.export_onnx_modules(tmp_path / "fresh", **FAST)
    assert not (tmp_path / "fresh").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failing_move_is_undone(tmp_path: Path) -> None:
    program, out = compiled(), tmp_path / "out"
    program.export_onnx_modules(out, **FAST)
    (out / "manifest.json").unlink()
    (out / "manifest.json").mkdir()  # the last file cannot take its place
    before = {p.name: p.read_bytes() for p in out.glob("*.onnx")}
    with torch.no_grad():
        program.model[0].weight += 1.0
    with pytest.raises(locc.ExportError, match=r"manifest\.json"):
        program.export_onnx_modules(out, **FAST)
    assert {p.name: p.read_bytes() for p in out.glob("*.onnx")} == before
    assert not list(out.glob(".locc-*"))


def test_files_of_an_earlier_export_go_and_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compiled().export_onnx_modules(out, **FAST)
    (out / "notes.txt").write_text("mine")
    compiled(splits=["1"]).export_onnx_modules(out, **FAST)
    assert sorted(content(out)) == ["00_1.onnx", "01_output.onnx", "manifest.json", "notes.txt"]


def test_refuses_places_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(locc.ExportError, match="it is a file"):
        compiled().export_onnx_modules(tmp_path / "file")
    with pytest.raises(locc.ExportError, match="does not exist"):
        compiled().export_onnx_modules(tmp_path / "missing" / "out")


def test_a_chain_that_is_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = modules.run_chain

    def off(*args: Any, **kwargs: Any) -> Any:
        return {name: value + 0.5 for name, value in right(*args, **kwargs).items()}

    monkeypatch.setattr(modules, "run_chain", off)
    with pytest.raises(
        locc.ExportError, match=r"'output' at batch size 1 differs .* by 5.0e-01.*chain of modules"
    ):
        compiled().export_onnx_modules(tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return compiled().export_onnx_modules(tmp_path_factory.mktemp("exported") / "out", **FAST)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs": np.zeros((2, 6), np.float32)}, "no input 'inputs'; nearest: 'input'"),
        ({}, "input 'input' is missing"),
        ({"input": np.zeros((2, 6))}, r"must be float32\[batch, 6\]; found float64\[2, 6\]"),
        ({"input": np.zeros((2, 7), np.float32)}, r"found float32\[2, 7\]"),
        ({"input": np.zeros(6, np.float32)}, r"found float32\[6\]"),
    ],
)
def test_run_manifest_refuses_inputs_that_do_not_fit(exported: Path, inputs: Any, message: str) -> None:
    with pytest.raises(locc.ExportError, match=message):
        run_manifest(exported, inputs)


def test_run_manifest_refuses_files_that_changed(tmp_path: Path) -> None:
    path = compiled().export_onnx_modules(tmp_path / "out", **FAST)
    x = {"input": np.zeros((2, 6), np.float32)}
    assert run_manifest(path.parent, x)["output"].shape == (2, 3)
    part = path.parent / "01_3.onnx"
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(locc.ExportError, match="changed since the manifest was written"):
        run_manifest(path, x)
    part.unlink()
    with pytest.raises(locc.ExportError, match="is missing"):
        run_manifest(path, x)
    for text, message in (
        ("{", "cannot read"),
        ("{}", "no manifest of locc"),
        ('{"format": "locc-modules", "version": 9}', "version 9"),
    ):
        path.write_text(text)
        with pytest.raises(locc.ExportError, match=message):
            run_manifest(path, x)
    with pytest.raises(locc.ExportError, match="cannot read"):
        run_manifest(tmp_path / "nowhere", x)
