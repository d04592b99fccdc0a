"""What is kept of a capture: it spares runs, never decides what is captured, and gives way to any doubt."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from locc.capture import cached, capture, pipeline
from locc.capture.graphs import Trace
from locc.capture.targets import Applied
from locc.errors import CaptureError
from locc.ir.captured import Captured, Inputs, Root
from locc.ir.spec import Point
from zoo import find
from zoo.two import Two, sample, take


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCC_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def admitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each graph that passes the whole admission test."""
    passed: list[int] = []
    original = pipeline.admit

    def admit(*given: Any) -> Any:
        passed.append(1)
        return original(*given)

    monkeypatch.setattr(pipeline, "admit", admit)
    return passed


def taken(model: nn.Module, name: str) -> Captured:
    case = find(name)
    return capture(Root(model), Inputs.of(model, case.inputs()), case.opened(case.splits[0]), cache=True)


def told(found: Captured) -> list[Any]:
    """Everything that later stages read of a capture."""
    nodes = [
        (n.op, n.name, repr(n.args), {k: repr(v) for k, v in n.meta.items()})
        for graph in (found.training, found.inference)
        for n in graph.nodes
    ]
    guards = [g.text for g in found.signature.guards]
    return [nodes, guards, found.signature.specs, found.origin, found.notes]


@pytest.mark.parametrize("name", ["resnet18", "vit", "functional_dropout", "running_mean"])
def test_a_kept_capture_is_the_one_that_was_made(name: str, admitted: list[int], place: Path) -> None:
    pytest.importorskip("transformers") if name.startswith("hf") else None
    model = find(name).build()
    first = taken(model, name)
    made = len(admitted)
    assert len(list(place.iterdir())) == 1
    second = taken(find(name).build(), name)
    assert len(admitted) == made
    assert told(second) == told(first)


@pytest.mark.parametrize("damage", ["cut short", "another record", "no JSON", "other shapes"])
def test_a_broken_file_is_noted_and_replaced(
    damage: str, admitted: list[int], place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = find("resnet18").build()
    first = taken(model, "resnet18")
    path = next(place.iterdir())
    whole = path.read_text()
    kept = json.loads(whole)
    kept["record"]["lifted"] = True
    broken = {"cut short": whole[:-40], "another record": json.dumps(kept), "no JSON": "\0"}
    if damage == "other shapes":  # as from a model that has changed where no key can see it
        kept["record"]["training"]["looks"][0][1][1][1][0] += 1
        kept["check"] = cached._digest(kept["record"])
        broken[damage] = json.dumps(kept)
    path.write_text(broken[damage])
    made = len(admitted)
    with caplog.at_level(logging.WARNING, "locc"):
        assert told(taken(model, "resnet18")) == told(first)
    assert "made anew" in caplog.text
    assert len(admitted) > made
    assert path.read_text() == whole


def test_what_is_kept_for_other_code_is_not_found(
    admitted: list[int], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = find("resnet18").build()
    taken(model, "resnet18")
    made = len(admitted)
    monkeypatch.setattr(cached, "_versions", lambda: ["another torch"])
    taken(model, "resnet18")
    assert len(admitted) > made
    monkeypatch.undo()
    monkeypatch.setenv("LOCC_CACHE", str(place))
    monkeypatch.setattr(cached, "_source", lambda kind: "another text")
    taken(model, "resnet18")
    assert len(list(place.iterdir())) == 3


def test_an_attribute_that_changes_the_graph_is_seen(admitted: list[int]) -> None:
    model = Two(lambda m, x: m.b(m.a(x) * m.factor))
    for factor in (2.0, 3.0):
        model.factor = factor
        made = len(admitted)
        found = capture(Root(model), Inputs((sample(),), {}), frozenset({"model"}), cache=True)
        assert any(factor in n.args for n in found.training.nodes)
        assert len(admitted) > made


def test_a_setting_of_a_closed_module_is_seen(admitted: list[int]) -> None:
    """Neither the graph nor a shape at this size tells the two apart; a shape at another size might."""
    for pool in (nn.AvgPool1d(1), nn.AvgPool1d(3, 1, 1)):
        model = Two(lambda m, x: m.b(m.leaf(m.a(x))), pool)
        made = len(admitted)
        capture(Root(model), Inputs((sample(),), {}), frozenset({"model"}), cache=True)
        assert len(admitted) > made


@pytest.mark.parametrize(("key", "full"), [("name", True), ((0, 1), False)])
def test_a_record_that_cannot_be_written_leaves_nothing(
    key: Any, full: bool, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("the disk is full")

    if full:
        monkeypatch.setattr(cached.os, "replace", refuse)
    mode = cached.Mode([Point(2)], "digest", {Point(2): [{key: None}]})
    cached.write("key", cached.Record("fx", mode, mode, False, False))
    assert "cannot be kept" in caplog.text
    assert not place.exists() or list(place.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCC_CACHE", str(tmp_path / "file"))
    assert taken(find("resnet18").build(), "resnet18").origin == "fx"
    assert "cannot be kept" in caplog.text


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is right for a batch of four alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (len(gradient) / 4)


def test_a_gradient_that_is_wrong_at_another_size_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pipeline.symbolic.trace

    def trace(*args: Any) -> Trace:
        found = original(*args)
        relu = next(n for n in found.graph.nodes if n.target is torch.relu)
        with found.graph.inserting_after(relu):
            scaled = found.graph.call_function(Applied(Scaled), (relu,))
        relu.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        scaled.meta = dict(relu.meta)
        return found

    def refuse(*_: Any) -> Trace:
        raise CaptureError("switched off")

    monkeypatch.setattr(pipeline.symbolic, "trace", trace)
    monkeypatch.setattr(pipeline.export, "trace", refuse)
    monkeypatch.setattr(pipeline.concrete, "trace", refuse)
    with pytest.raises(
        CaptureError, match=r"the gradient of .* differs from eager in train mode at a batch of 3"
    ):
        take(Two(lambda m, x: m.b(torch.relu(m.leaf(m.a(x))))), sample())


@pytest.mark.parametrize("seen", [True, False])
def test_inference_has_a_trace_of_its_own_where_the_mode_matters(seen: bool) -> None:
    """Also where the forward finds the mode behind the back of whoever watches its reads."""

    def middle(m: Any, x: Tensor) -> Tensor:
        training = m.training if seen else vars(m)["training"]
        return m.b(m.a(x) if training else torch.tanh(m.a(x)))

    found = take(Two(middle), sample())
    tanh = [[n for n in graph.nodes if n.target is torch.tanh] for graph in (found.training, found.inference)]
    assert [len(nodes) for nodes in tanh] == [0, 1]


def test_one_trace_serves_both_modes_where_no_mode_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    original = pipeline.symbolic.trace

    def trace(*args: Any) -> Trace:
        modes.append(args[3])
        return original(*args)

    monkeypatch.setattr(pipeline.symbolic, "trace", trace)
    found = take(Two(lambda m, x: m.b(m.leaf(m.a(x))), nn.Dropout(0.5)), sample())
    assert modes == [True]
    assert not hasattr(nn.Module, "training")
    values = fx.GraphModule(found.root, found.inference).eval()(sample())
    assert torch.equal(values[0], found.root.model.eval()(sample()))
