"""The inference path as one file: what it computes, what it is called, and what a failure leaves behind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import locc
from locc.export import exporters, proto
from locc.export.compare import difference
from locc.export.names import identifier, unique
from locc.export.samples import resized
from locc.export.whole import network_of
from locc.ir.spec import Point
from zoo import CASES, Case, find
from zoo.hf import HAS_TRANSFORMERS

QUICK = ("mlp", "two_inputs", "keyword_inputs", "dict_output", "dataclass_output", "running_mean",
         "hooks", "functional_dropout", "custom_function", "unet", "lstm_lm", "gru_cells",
         "tied_functional")  # fmt: skip
MAINTAINED = ("hooks", "custom_function", "dict_output", "gru_cells", "no_grad_statistics")


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).to(
        dtype
    )


def compiled(
    model: nn.Module | None = None, x: Any = None, method: str = "bp", **options: Any
) -> locc.Program:
    options = {"splits": ["2"], "verify": False, **options}
    return locc.compile(
        model or small(), method, example_inputs=torch.randn(5, 6) if x is None else x, **options
    )


def run(path: Path, *inputs: Tensor) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_providers() == ["CPUExecutionProvider"]
    names = [i.name for i in session.get_inputs()]
    return list(session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)}))


def exporter_of(path: Path) -> str:
    return {p.key: p.value for p in onnx.load(str(path)).metadata_props}["locc.exporter"]


def in_eval(program: locc.Program, x: Any) -> Tensor:
    program.eval()
    with torch.no_grad():
        result = program(x)
    program.train()
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("batch", [1, 5, 17])
@pytest.mark.parametrize("exporter", ["torch.export", "TorchScript"])
def test_computes_the_eval_forward_at_any_batch(tmp_path: Path, exporter: str, batch: int) -> None:
    program = compiled()
    path = program.export_onnx(tmp_path / "model.onnx", exporter=exporter)
    x = torch.randn(batch, 6)
    (found,) = run(path, x)
    assert difference(found, in_eval(program, x).numpy()) < 1e-5
    assert exporter_of(path) == exporter


@pytest.mark.parametrize("name", QUICK)
def test_zoo(name: str, tmp_path: Path) -> None:
    path = find(name).compile().export_onnx(tmp_path / "model.onnx", exporter="TorchScript")
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert all(
        dim.dim_param == "batch" for i in model.graph.input for dim in i.type.tensor_type.shape.dim[:1]
    )


@pytest.mark.parametrize("name", MAINTAINED)
def test_zoo_by_the_maintained_exporter(name: str, tmp_path: Path) -> None:
    path = find(name).compile().export_onnx(tmp_path / "model.onnx", exporter="torch.export")
    assert exporter_of(path) == "torch.export"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in ("branch_in_leaf", "mutable_object")], ids=str
)
def test_whole_zoo_by_the_maintained_exporter(case: Case, tmp_path: Path) -> None:
    assert exporter_of(case.compile().export_onnx(tmp_path / "model.onnx")) in exporters.EXPORTERS


def test_program_stays_as_it_was(tmp_path: Path) -> None:
    program = compiled()
    program.model[1].eval()
    modes = [m.training for m in program.modules()]
    before = {name: t.clone() for name, t in program.state_dict().items()}
    random = torch.get_rng_state()
    fused = torch.backends.mha.get_fastpath_enabled()
    program.export_onnx(tmp_path / "model.onnx", exporter="TorchScript")
    assert [m.training for m in program.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in program.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert all(p.grad is None for p in program.parameters())


def test_buffers_written_in_eval_are_left_alone(tmp_path: Path) -> None:
    program = find("no_grad_statistics").compile()
    before = {name: b.clone() for name, b in program.named_buffers()}
    program.export_onnx(tmp_path / "model.onnx", exporter="torch.export")
    assert all(torch.equal(b, before[name]) for name, b in program.named_buffers())


def test_auxiliaries_are_gone(tmp_path: Path) -> None:
    program = compiled(method="dgl")
    assert sum(1 for _ in program.root.aux.parameters()) > 0
    path = program.export_onnx(tmp_path / "model.onnx", exporter="TorchScript")
    stored = sum(int(np.prod(t.dims)) for t in onnx.load(str(path)).graph.initializer)
    own = sum(t.numel() for t in program.model.state_dict().values())
    assert stored <= own


def test_names_are_the_users(tmp_path: Path) -> None:
    path = find("dict_output").compile().export_onnx(tmp_path / "model.onnx", exporter="TorchScript")
    model = onnx.load(str(path))
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == ["logits", "extra_0"]


class Clash(nn.Module):
    """Returns keys that are called like its input and like inner values of an exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        linear = self.linear(x)
        return {"x": linear, "linear": linear * 2, "again": linear, "same": x}


@pytest.mark.parametrize("exporter", exporters.EXPORTERS)
def test_names_never_clash(tmp_path: Path, exporter: str) -> None:
    program = compiled(Clash(), torch.randn(4, 6), splits=[], loss=lambda o, y: o["x"].sum())
    path = program.export_onnx(tmp_path / "m.onnx", exporter=exporter)
    graph = onnx.load(str(path)).graph
    assert [v.name for v in graph.input] == ["x"]
    assert [v.name for v in graph.output] == ["x_output", "linear", "again", "same"]
    x = torch.randn(3, 6)
    first, second, third, same = run(path, x)
    np.testing.assert_array_equal(same, x.numpy())
    np.testing.assert_allclose(second, 2 * first, rtol=1e-6)
    np.testing.assert_array_equal(first, third)


def test_an_inner_value_gives_way_to_a_users_name() -> None:
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    typed = (onnx.TensorProto.FLOAT, [None])
    graph = onnx.helper.make_graph(
        [node("Relu", ["locc_input_0"], ["logits"]), node("Neg", ["logits"], ["locc_output_0"])],
        "g",
        [info("locc_input_0", *typed)],
        [info("locc_output_0", *typed)],
    )
    proto._rename(graph, {"locc_input_0": "x", "locc_output_0": "logits"})
    onnx.checker.check_model(onnx.helper.make_model(graph))
    assert [list(n.input) + list(n.output) for n in graph.node] == [
        ["x", "logits_inner0"],
        ["logits_inner0", "logits"],
    ]


def test_identifiers() -> None:
    assert identifier("state[0].h") == "state_0_h"
    assert identifier("3") == "_3"
    assert identifier("größe") == "gr_e"
    assert unique(["a.b", "a_b", "x"], ["x"]) == ["a_b", "a_b_1", "x_1"]


def test_no_trace_of_the_exporting_machine(tmp_path: Path) -> None:
    path = compiled().export_onnx(tmp_path / "model.onnx", exporter="torch.export")
    content = path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content
    assert b"stack_trace" not in content


class Baked(nn.Module):
    """Reads the batch size as a Python number, which both exporters write down as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(int(x.shape[0]), 2, 2)


def test_a_file_that_knows_one_batch_size_is_noticed(tmp_path: Path) -> None:
    program = compiled(Baked(), splits=[], loss=lambda o, y: o.sum())
    with pytest.raises(locc.ExportError, match=r"batch size \d+"):
        program.export_onnx(tmp_path / "m.onnx", exporter="TorchScript")
    with pytest.raises(locc.ExportError, match=r"(?s)torch.export: .*TorchScript: "):
        program.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such op")

    monkeypatch.setattr(exporters, "_exported", broken)
    with pytest.warns(UserWarning, match=r"TorchScript exporter, since .* torch.export failed: .*no such op"):
        path = compiled().export_onnx(tmp_path / "m.onnx")
    assert exporter_of(path) == "TorchScript"


class Deciding(nn.Module):
    """Computes what a trace knows one side of, in ways that no comparison at a few small batches shows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(6, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.kind == "size":
            return y * max(x.shape[0], 100)
        if self.kind == "number":
            return y * (x > -100).sum(1).max().item()
        return -y if self.kind == "branch" and torch.equal(x, torch.zeros_like(x)) else y


@pytest.mark.parametrize(
    ("kind", "exporter", "warned"),
    [
        ("none", "TorchScript", False),
        ("size", "torch.export", False),
        ("number", "torch.export", False),
        ("branch", "TorchScript", True),
    ],
)
def test_the_fast_exporter_comes_first_where_nothing_is_decided(
    tmp_path: Path, kind: str, exporter: str, warned: bool
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Deciding(kind))
    program = compiled(model, splits=["0"], loss=lambda o, y: o.sum())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path = program.export_onnx(tmp_path / "m.onnx")
    assert exporter_of(path) == exporter
    assert (
        any("a trace holds the side that the example inputs take" in str(w.message) for w in told) == warned
    )
    x = torch.randn(200, 6)
    assert difference(run(path, x)[0], in_eval(program, x).numpy()) < 1e-5


@pytest.mark.parametrize(
    ("dynamic", "check", "first"),
    [(None, True, "TorchScript"), (None, False, "torch.export"), ("auto", True, "torch.export")],
)
def test_what_is_compared_less_goes_to_the_maintained_exporter(dynamic: Any, check: bool, first: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    program = compiled(model, torch.randn(4, 5, 6), splits=["0"], loss=lambda o, y: o.sum(), dynamic=dynamic)
    attempts = exporters._attempts(network_of(program), exporters.Options(check=check))
    assert next(attempts)[0] == first


def test_a_wrong_file_never_replaces_a_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled()
    path = program.export_onnx(tmp_path / "m.onnx", exporter="TorchScript")
    before = path.read_bytes()
    right = exporters._torchscript

    def wrong(network: Any, target: Path, options: Any) -> None:
        with torch.no_grad():
            program.model[4].bias += 0.25
            right(network, target, options)
            program.model[4].bias -= 0.25

    monkeypatch.setattr(exporters, "_torchscript", wrong)
    with pytest.raises(
        locc.ExportError, match=r"output 'output' at batch size 1 differs from PyTorch by 2.5e-01"
    ):
        program.export_onnx(path, exporter="TorchScript")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    unchecked = program.export_onnx(tmp_path / "n.onnx", exporter="TorchScript", check=False)
    assert unchecked.is_file()


def test_refuses_places_where_it_cannot_write(tmp_path: Path) -> None:
    program = compiled()
    (tmp_path / "file").write_text("")
    with pytest.raises(locc.ExportError, match="does not exist; create it first"):
        program.export_onnx(tmp_path / "missing" / "m.onnx")
    with pytest.raises(locc.ExportError, match="is not a folder"):
        program.export_onnx(tmp_path / "file" / "m.onnx")
    with pytest.raises(locc.ExportError, match="it is a folder"):
        program.export_onnx(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 3}, "opset=3"),
        ({"exporter": "onnx"}, "'TorchScript'"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
    ],
)
def test_refuses_unusable_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(locc.ExportError, match=message):
        compiled().export_onnx(tmp_path / "m.onnx", **options)


def test_opset(tmp_path: Path) -> None:
    path = compiled().export_onnx(tmp_path / "m.onnx", opset=17, exporter="TorchScript")
    assert onnx.load(str(path)).opset_import[0].version == 17


def test_float64(tmp_path: Path) -> None:
    program = compiled(small(torch.float64), torch.randn(5, 6, dtype=torch.float64))
    path = program.export_onnx(tmp_path / "m.onnx", exporter="TorchScript")
    x = torch.randn(2, 6, dtype=torch.float64)
    assert difference(run(path, x)[0], in_eval(program, x).numpy()) < 1e-12


@pytest.mark.parametrize("exporter", exporters.EXPORTERS)
def test_weights_in_a_file_of_their_own(
    tmp_path: Path, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compiled()
    path = tmp_path / "m.onnx"
    program.export_onnx(path, exporter=exporter, external_data=True)
    (data,) = tmp_path.glob("m.onnx.*.data")
    x = torch.randn(3, 6)
    old = run(path, x)[0]
    assert difference(old, in_eval(program, x).numpy()) < 1e-5

    with torch.no_grad():
        program.model[4].weight += 1.0
    monkeypatch.setattr(exporters, "compare", lambda *_: (_ for _ in ()).throw(locc.ExportError("differs")))
    with pytest.raises(locc.ExportError, match="differs"):
        program.export_onnx(path, exporter=exporter, external_data=True)
    np.testing.assert_array_equal(run(path, x)[0], old)
    monkeypatch.undo()

    program.export_onnx(path, exporter=exporter, external_data=True)
    (new,) = tmp_path.glob("m.onnx.*.data")
    assert new.name != data.name
    assert difference(run(path, x)[0], in_eval(program, x).numpy()) < 1e-5
    assert len(list(tmp_path.iterdir())) == 2


def test_large_weights_are_not_copied_into_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locc.export.network.LARGE", 100)
    path = compiled().export_onnx(tmp_path / "m.onnx")
    assert exporter_of(path) == "torch.export"
    assert len(list(tmp_path.glob("m.onnx.*.data"))) == 1


def test_weights_in_a_file_of_their_own_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = proto.finish

    def spoiled(path: Path, *given: Any) -> str | None:
        name = finish(path, *given)
        assert name is not None
        (path.parent / name).write_bytes(bytes((path.parent / name).stat().st_size))
        return name

    monkeypatch.setattr(proto, "finish", spoiled)
    with pytest.raises(locc.ExportError, match="differs from PyTorch"):
        compiled().export_onnx(tmp_path / "m.onnx", external_data=True)


def test_batches_that_are_made_larger_hold_different_samples() -> None:
    program = compiled(x=torch.randn(2, 6))
    (x,) = resized(program.ir, [torch.randn(2, 6)], Point(7))
    assert x.shape == (7, 6)
    assert len({tuple(row.tolist()) for row in x}) == 7


def test_difference() -> None:
    one = np.array([1.0, np.nan, np.inf, 100.0], np.float32)
    assert difference(one, one) == 0.0
    assert difference(one + np.float32(0.5), one) == pytest.approx(0.005)
    assert difference(np.zeros(4, np.float32), one) == np.inf
    assert difference(np.array([1]), np.array([2])) == np.inf


class Experts(nn.Module):
    """Sorts rows by expert and multiplies each group by its own matrix, as Hugging Face's experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        scores, expert = self.gate(x).max(-1)
        expert, order = torch.sort(expert)
        ends = torch.cumsum(torch.histc(expert.float(), bins=3, min=0, max=2), 0, dtype=torch.int32)
        rows = torch.ops.transformers.grouped_mm_fallback(x[order], self.weight, ends)
        return torch.zeros_like(x).index_add(0, order, rows * scores[order, None])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs transformers")
def test_groups_of_experts_are_written(tmp_path: Path) -> None:
    import transformers.integrations.moe  # noqa: F401  it registers the product of groups

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Experts(), nn.Linear(6, 4))
    program = compiled(model, splits=["0"])
    program.export_onnx(tmp_path / "experts.onnx")
    x = torch.randn(9, 6)
    (found,) = run(tmp_path / "experts.onnx", x)
    np.testing.assert_allclose(found, program.eval()(x).detach().numpy(), atol=1e-5)
