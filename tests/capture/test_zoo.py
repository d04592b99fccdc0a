"""Every model of the zoo, cut in several ways, becomes two graphs that compute what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from locc.capture import capture
from locc.capture.batch import Call
from locc.capture.tree import leaves_of
from locc.errors import CaptureError
from locc.ir.captured import Captured, Inputs, Root
from locc.ir.spec import BatchDim, Point, TensorSpec
from zoo import CASES, REFUSED, Case
from zoo.case import BATCH

CUTS = [
    pytest.param(
        case, splits, case.origins[i] if i < len(case.origins) else None,
        id=f"{case.name}-{'+'.join(splits)}", marks=[pytest.mark.slow] if "slow" in case.tags else [],
    )
    for case in CASES for i, splits in enumerate(case.splits)
]  # fmt: skip


def captured(case: Case, splits: tuple[str, ...]) -> tuple[Captured, Inputs]:
    model = case.build()
    inputs = Inputs.of(model, case.inputs())
    return capture(Root(model), inputs, case.opened(splits)), inputs


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def run(found: Captured, training: bool, inputs: Inputs) -> Any:
    """Run a captured graph as plain generated Python and rebuild the user's structure."""
    graph = found.training if training else found.inference
    rebuild = found.output if training or found.inference_output is None else found.inference_output
    module = fx.GraphModule(found.root, graph)
    flat = module(*found.signature.bind(inputs))
    return rebuild(*flat)


@pytest.mark.parametrize(("case", "splits", "origin"), CUTS)
def test_it_captures_and_runs_as_generated_code(
    case: Case, splits: tuple[str, ...], origin: str | None
) -> None:
    found, inputs = captured(case, splits)
    if origin is not None:
        assert found.origin == origin
    for batch in (BATCH, BATCH + 3):
        call = Call(found.root.model, inputs)
        bigger = call.inputs(call.at(Point(batch)))
        for training in (True, False):
            found.root.train(training)
            state = {k: v.clone() for k, v in found.root.state_dict().items()}
            torch.manual_seed(3)
            expected = found.root(*bigger.args, **bigger.kwargs)
            written = {k: v.clone() for k, v in found.root.state_dict().items()}
            found.root.load_state_dict(state)
            torch.manual_seed(3)
            result = run(found, training, bigger)
            assert type(result) is type(expected)
            for one, other in zip(tensors(result), tensors(expected), strict=True):
                torch.testing.assert_close(one, other)
            torch.testing.assert_close(dict(found.root.state_dict()), written)


@pytest.mark.parametrize(
    ("case", "splits", "origin"), [CUTS[0], *[c for c in CUTS if "resnet18" in str(c.id)]]
)
def test_every_node_has_its_metadata(case: Case, splits: tuple[str, ...], origin: str | None) -> None:
    found, _ = captured(case, splits)
    for graph in (found.training, found.inference):
        for node in graph.nodes:
            assert "spec" in node.meta
            assert "stack" in node.meta
            if node.op == "call_module":
                assert node.meta["stack"][-1][0] == node.target
                assert node.meta["stack"][0] == ("model", 0)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_data_dependent_branch_between_leaves_is_refused_with_its_line(case: Case) -> None:
    model = case.build()
    with pytest.raises(CaptureError) as caught:
        capture(Root(model), Inputs.of(model, case.inputs()), case.opened(case.splits[0]))
    message = str(caught.value)
    source = {"branch_between": "if x.sum() > 0:", "item_between": "x = x / x.abs().max().item()"}[case.name]
    assert "special.py:" in message
    assert source in message
    assert "torch.where" in message


def test_a_placeholder_knows_the_batch() -> None:
    found, _ = captured(next(c for c in CASES if c.name == "resnet18"), ("layer2",))
    (placeholder,) = [n for n in found.training.nodes if n.op == "placeholder"]
    assert placeholder.meta["spec"] == TensorSpec((BatchDim(), 3, 32, 32), torch.float32)
    assert str(found.signature.specs[0]) == "f32[B,3,32,32]"
    assert found.signature.names == ("x",)


def test_every_case_builds_the_same_model_twice_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    for case in CASES:
        one, other = case.build().state_dict(), case.build().state_dict()
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(before, torch.get_rng_state())


def test_every_case_has_a_loss_that_its_parameters_feel() -> None:
    losses = {"cross_entropy": torch.nn.functional.cross_entropy}
    for case in CASES:
        if "slow" in case.tags:
            continue
        model = case.build()
        inputs = Inputs.of(model, case.inputs())
        loss = losses[case.loss] if isinstance(case.loss, str) else case.loss
        value = loss(model(*inputs.args, **inputs.kwargs), case.target(BATCH))
        assert value.dim() == 0
        value.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()), case.name
