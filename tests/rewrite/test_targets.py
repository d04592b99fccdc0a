"""A target that a method cannot read is one sentence, at compile time or before the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from replay_buffer import Buffered
from torch import Tensor, nn

import locc
import support
from locc.ir import BatchDim, TensorSpec
from locc.rewrite.targets import CLASS_IDS, NUMBERS, misfit

B = BatchDim()
FLAT, TOKENS, PIXELS, ONE = (
    TensorSpec(shape, torch.float32) for shape in ((B, 3), (B, 5, 3), (B, 3, 8, 8), (B,))
)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kinds", "output", "target"),
    [
        ((CLASS_IDS,), FLAT, ids(4)),
        ((CLASS_IDS,), FLAT, ids(4).to(torch.uint8)),
        ((CLASS_IDS,), TOKENS, ids(4, 5)),
        ((CLASS_IDS,), PIXELS, ids(4, 8, 8)),
        ((NUMBERS,), FLAT, torch.rand(4, 3)),
        ((NUMBERS,), FLAT, ids(4, 3)),
        ((CLASS_IDS, NUMBERS), PIXELS, torch.rand(4, 3, 8, 8)),
        ((NUMBERS,), ONE, torch.rand(4)),
        ((), FLAT, {"any": "thing"}),
    ],
)
def test_targets_of_a_kind_are_taken(kinds: tuple[str, ...], output: TensorSpec, target: Any) -> None:
    assert misfit("m", kinds, output, target) is None


@pytest.mark.parametrize(
    ("kinds", "output", "target", "words"),
    [
        (
            (CLASS_IDS,),
            FLAT,
            torch.rand(4),
            "class ids [B] as target, for the output f32[B,3]; found a tensor",
        ),
        ((CLASS_IDS,), FLAT, ids(4, 3), "found a tensor of shape [4,3] and dtype torch.int64"),
        ((CLASS_IDS, NUMBERS), FLAT, ids(4, 1), "needs class ids [B] or numbers [B,3] as target"),
        ((CLASS_IDS, NUMBERS), TOKENS, ids(20), "needs class ids [B,5] or numbers [B,5,3] as target"),
        ((CLASS_IDS,), PIXELS, ids(4, 7, 8), "needs class ids [B,8,8] as target"),
        ((CLASS_IDS,), FLAT, None, "found NoneType"),
        ((NUMBERS,), FLAT, {"y": ids(4)}, "found dict"),
        ((CLASS_IDS,), ONE, ids(4), "needs class ids as target, for the output f32[B]"),
    ],
)
def test_another_target_is_a_sentence(
    kinds: tuple[str, ...], output: TensorSpec, target: Any, words: str
) -> None:
    found = misfit("m", kinds, output, target)
    assert found is not None
    assert words in found


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def unlabelled(output: Tensor, target: None) -> Tensor:
    assert target is None
    return output.square().mean()


@pytest.mark.parametrize(
    ("loss", "takes"), [(squares, r"numbers \[\d, 3\]"), (unlabelled, "no target")], ids=["numbers", "none"]
)
def test_a_loss_that_takes_no_such_target_is_refused_at_compile_time(loss: Any, takes: str) -> None:
    words = r"undefined on this model: for the output f32\[B,3\] it needs class ids \[B\] as target, and loss"
    model = support.mlp()
    before = support.snapshot(model)
    with pytest.raises(locc.MethodError, match=rf"{words} '{loss.__name__}' does not take that, but {takes}"):
        support.compiled(model, Buffered(), ["relu1"], loss=loss)
    assert support.same(support.snapshot(model), before)
    report = locc.examine(support.mlp(), Buffered(), ["relu1"], loss=loss, example_inputs=support.batch()[0])
    assert report.stage == "rewrite"
    assert loss.__name__ in str(report.problem)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce", "l1"])
def test_losses_that_take_class_ids_are_not_refused(loss: str) -> None:
    program = support.compiled(support.mlp(), Buffered(), ["relu1"], loss=loss)
    assert program.step(*support.batch()).loss.isfinite()


def test_a_loss_for_which_no_target_can_be_made_up_is_tried_in_the_step() -> None:
    def of_dict(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        assert isinstance(target, dict)
        return nn.functional.cross_entropy(output, target["y"])

    program = support.compiled(support.mlp(), Buffered(), ["relu1"], loss=of_dict, verify=False)
    x, y = support.batch()
    with pytest.raises(locc.RunError, match=r"needs class ids .* found dict"):
        program.step(x, {"y": y})


@pytest.mark.parametrize("known", [True, False], ids=["example inputs", "first step"])
@pytest.mark.parametrize("method", ["sim", "predsim", "al"])
def test_a_wrong_target_changes_nothing(method: str, known: bool) -> None:
    x = support.batch()[0]
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    program = locc.compile(model, method, ["1"], loss="mse", example_inputs=x if known else None)
    before = support.snapshot(model)
    for target in (torch.rand(5), None):
        with pytest.raises(locc.RunError, match=rf"'{method}' needs class ids \[B\] or numbers \[B,3\]"):
            program.step(x, target)
    assert support.same(model.state_dict(), before)
    assert program.steps == 0


def test_many_hot_integers_are_rows_for_associated_learning() -> None:
    x, y = support.batch()[0], torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]])
    one, other = (support.compiled(support.mlp(), "al", ["relu1"], loss="bce", seed=1) for _ in range(2))
    other.root.load_state_dict(one.root.state_dict())
    assert torch.equal(one.step(x, y).loss, other.step(x, y.float()).loss)


def test_the_target_of_a_single_kind_has_a_spec() -> None:
    assert support.compiled(support.mlp(), Buffered(), ["relu1"]).ir.target.meta["spec"] == TensorSpec(
        (B,), torch.int64
    )
    assert support.compiled(support.mlp(), "sim", ["relu1"]).ir.target.meta["spec"] is None
