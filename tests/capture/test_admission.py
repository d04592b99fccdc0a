"""The admission test, the state it leaves behind, and the order of the mechanisms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from locc import split
from locc.capture import capture, marker_ancestors, pipeline
from locc.capture.graphs import Trace
from locc.errors import CaptureError
from locc.ir.captured import Inputs, Root
from zoo import find
from zoo.two import Two, sample, take


def refuse(*_: Any) -> Trace:
    raise CaptureError("switched off")


def only_broken(monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    """Let the first mechanism give a damaged graph, and the others none."""
    original = pipeline.symbolic.trace

    def trace(*args: Any) -> Trace:
        found = original(*args)
        damage(found.graph)
        return found

    monkeypatch.setattr(pipeline.symbolic, "trace", trace)
    monkeypatch.setattr(pipeline.export, "trace", refuse)
    monkeypatch.setattr(pipeline.concrete, "trace", refuse)


def middle(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.relu(m.leaf(m.a(x))))


def test_a_wrong_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(graph: fx.Graph) -> None:
        next(n for n in graph.nodes if n.target is torch.relu).target = torch.tanh

    only_broken(monkeypatch, damage)
    with pytest.raises(CaptureError, match="the output differs from eager in train mode at a batch of 4: by"):
        take(Two(middle), sample())


def test_a_lost_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(graph: fx.Graph) -> None:
        relu = next(n for n in graph.nodes if n.target is torch.relu)
        with graph.inserting_after(relu):
            cut = graph.call_method("detach", (relu,))
        relu.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)
        cut.meta = dict(relu.meta)

    only_broken(monkeypatch, damage)
    with pytest.raises(CaptureError, match=r"the gradient of parameter 'a.weight' differs from eager"):
        take(Two(middle), sample())


def test_a_lost_buffer_update_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(graph: fx.Graph) -> None:
        leaf = next(n for n in graph.nodes if n.target == "model.leaf")
        leaf.replace_all_uses_with(leaf.args[0])
        graph.erase_node(leaf)

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x

    only_broken(monkeypatch, damage)
    with pytest.raises(CaptureError, match=r"buffer 'leaf.count' after the step differs"):
        take(Two(middle, Counting()), sample())


def fixed_to_four(graph: fx.Graph) -> None:
    relu = next(n for n in graph.nodes if n.target is torch.relu)
    with graph.inserting_after(relu):
        fixed = graph.call_method("reshape", (relu, 4, -1))
    relu.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)
    fixed.meta = dict(relu.meta)


def test_a_constant_of_the_example_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    only_broken(monkeypatch, fixed_to_four)
    with pytest.raises(CaptureError, match=r"fails where the model does not \(a batch of 3\).*of size \d+\n"):
        take(Two(middle), sample())


def test_what_could_stay_closed_is_named_where_a_graph_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    only_broken(monkeypatch, fixed_to_four)
    root, inner = Root(nn.Sequential(nn.Sequential(Two(middle)))), "model.0.0"
    opened = frozenset({"model", "model.0", inner})
    with pytest.raises(
        CaptureError, match=r"a batch of 3.*; '0\.0' can keep it inside if no split lies with"
    ):
        capture(root, Inputs.of(root.model, sample()), opened)


def test_all_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    only_broken(monkeypatch, refuse)
    with pytest.raises(CaptureError, match=r"(?s)could not be captured.*Also tried.*torch.fx.*torch.export"):
        take(Two(middle), sample())


def test_a_model_that_fails_by_itself_is_told_apart() -> None:
    with pytest.raises(CaptureError, match=r"the model itself fails on the example inputs.*RuntimeError"):
        take(Two(lambda m, x: m.b(m.a(x) @ torch.ones(5))), sample())


def test_only_export_sees_through_a_mutable_object(monkeypatch: pytest.MonkeyPatch) -> None:
    case = find("mutable_object")
    model = case.build()
    found = capture(Root(model), Inputs.of(model, case.inputs()), frozenset({"model"}))
    assert found.origin == "export"
    stacks = {n.meta["stack"] for n in found.training.nodes if n.op == "call_function"}
    assert (("model", 0), ("model.first", 0), ("model.first.linear", 0)) in stacks
    assert {n.target for n in found.training.nodes if n.op == "get_attr"} == {
        f"model.{name}" for name, _ in model.named_parameters()
    }
    monkeypatch.setattr(pipeline.export, "trace", refuse)
    with pytest.raises(CaptureError, match=r"argument 'notes' of 'first' is a Notes"):
        capture(Root(model), Inputs.of(model, case.inputs()), frozenset({"model"}))


def test_export_may_not_drop_a_custom_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    case = find("custom_function")
    model = case.build()
    monkeypatch.setattr(pipeline.symbolic, "trace", refuse)
    monkeypatch.setattr(pipeline.concrete, "trace", refuse)
    with pytest.raises(CaptureError, match="could not be captured"):
        capture(Root(model), Inputs.of(model, case.inputs()), frozenset({"model"}))


def test_a_closed_model_is_one_leaf_with_its_structure() -> None:
    case = find("dict_output")
    model = case.build()
    found = capture(Root(model), Inputs.of(model, case.inputs()), frozenset())
    assert [n.target for n in found.training.nodes if n.op == "call_module"] == ["model"]
    flat = fx.GraphModule(found.root, found.training)(*found.signature.bind(Inputs.of(model, case.inputs())))
    output = found.output(*flat)
    assert list(output) == ["logits", "extra", "version"]
    assert output["extra"][1] is None
    assert output["version"] == 3


def test_a_wrong_call_is_named() -> None:
    case = find("two_inputs")
    model = case.build()
    image, text = case.inputs()
    found = capture(Root(model), Inputs((image, text, 2.0), {}), frozenset({"model"}))
    with pytest.raises(Exception, match=r"argument '.*' was 2.0 and now is 3.0"):
        found.signature.bind(Inputs((image, text, 3.0), {}))
    with pytest.raises(Exception, match="nested differently"):
        found.signature.bind(Inputs((image, text), {}))


def test_an_unknown_path_is_named() -> None:
    with pytest.raises(CaptureError, match="'layerz' was to be opened, but is no submodule"):
        take(Two(middle), sample(), "model.layerz")


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 6), MarkedInner(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = split(self.stem(x), "stem")
        return self.head(self.inner(x))


class MarkedInner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(split(torch.relu(self.one(x)), name="inner"))


def test_markers_are_found_and_kept_in_the_graph() -> None:
    model = Marked()
    root, inputs = Root(model), Inputs((sample(),), {})
    opened, names = marker_ancestors(root, inputs)
    assert opened == {"model", "model.inner"}
    assert names == ("stem", "inner")
    for switch in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if switch:
                patch.setattr(pipeline.symbolic, "trace", refuse)
            found = capture(root, inputs, opened)
        assert found.origin == ("concrete" if switch else "fx")
        marks = [n for n in found.training.nodes if n.target is split]
        assert [m.kwargs.get("name", m.args[-1]) for m in marks] == ["stem", "inner"]
        assert [m.meta["stack"] for m in marks] == [(("model", 0),), (("model", 0), ("model.inner", 0))]


def test_a_marker_reached_twice_is_refused() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = split(m.a(x), "again")
        return x

    with pytest.raises(CaptureError, match="'again' is reached 2 times"):
        marker_ancestors(Root(Two(between)), Inputs((sample(),), {}))


def test_a_batch_norm_example_of_one_sample_is_captured_from_larger_batches() -> None:
    found = take(Two(lambda m, x: m.b(m.leaf(m.a(x))), nn.BatchNorm1d(6)), sample(1))
    assert str(found.signature.specs[0]) == "f32[B,6]"
    assert str(found.training.output_node().meta["spec"][0]) == "f32[B,6]"


def test_a_training_output_of_another_structure_than_the_inference_output() -> None:
    def between(m: Any, x: Tensor) -> Any:
        x = m.b(m.a(x))
        return {"logits": x, "aux": x * 2} if m.training else x

    found = take(Two(between), sample())
    assert found.inference_output is not None
    assert set(found.output(*found_values(found, True))) == {"logits", "aux"}
    assert isinstance(found.inference_output(*found_values(found, False)), Tensor)


def found_values(found: Any, training: bool) -> Any:
    graph = found.training if training else found.inference
    return fx.GraphModule(found.root, graph)(sample())
