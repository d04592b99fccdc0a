from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import locc
from locc import Program, RunError
from support import batch, compiled, mlp, same, snapshot


class Shaped(nn.Module):
    """Gives an output of any shape: two linear layers, and a view with the batch in dimension `batch`."""

    def __init__(self, *shape: int, batch: int = 0, wrap: Any = None) -> None:
        super().__init__()
        self.shape, self.batch, self.wrap = shape, batch, wrap
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, int(torch.tensor(shape).prod()))

    def forward(self, x: Tensor) -> Any:
        out = self.b(torch.tanh(self.a(x))).unflatten(1, self.shape).movedim(0, self.batch)
        return out if self.wrap is None else self.wrap(logits=out)


def program_of(*shape: int, loss: str = "cross_entropy", verify: bool = False, **options: Any) -> Program:
    return compiled(Shaped(*shape, **options), "bp", ["a"], loss=loss, verify=verify)


def rows_last(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def hugging_face() -> Any:
    return pytest.importorskip("transformers").modeling_outputs.CausalLMOutput


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ((3, 7), (6, 7), F.cross_entropy),
        ((7, 3), (6, 7), rows_last),
        ((7, 7), (6, 7), F.cross_entropy),
        ((3, 4, 5), (6, 4, 5), F.cross_entropy),
        ((3, 3, 3), (6, 3, 3), F.cross_entropy),
        ((4, 5, 3), (6, 4, 5), rows_last),
    ],
    ids=["[B,C,T]", "[B,T,V]", "C equals T", "[B,C,H,W]", "C, H and W equal", "[B,H,W,C]"],
)
@pytest.mark.parametrize("method", ["bp", "dgl"])
def test_the_target_tells_where_the_classes_are(method, shape, target, expected):
    program = compiled(Shaped(*shape), method, ["a"], verify=False)
    x, y = batch(6)[0], torch.randint(3, target)
    wanted = expected(program.model(x), y)
    assert torch.equal(program.step(x, y).loss, wanted.detach())


def test_the_output_of_a_language_model_has_its_classes_last():
    program = program_of(5, 5, wrap=hugging_face(), verify=True)
    x, y = batch()[0], torch.randint(5, (5, 5))
    wanted = rows_last(program.model(x).logits, y)
    hits = (program.model(x).logits.argmax(-1) == y).float().mean()
    assert program.evaluate([(x, y)]).accuracy == pytest.approx(float(hits))
    assert torch.equal(program.step(x, y).loss, wanted.detach())
    assert "cross_entropy of f32[B,5,5], its classes in dimension 2" in str(program.certificate)


def test_local_heads_read_a_target_as_the_output_does():
    program = compiled(
        Shaped(5, 5, wrap=hugging_face()), locc.method("dgl", local_loss="cross_entropy"), ["a"], verify=False
    )
    x, y = batch()[0], torch.randint(5, (5, 5))
    (head,) = program.ir.nodes("a", "head")
    found = program.root.get_submodule(head.target)(program.model.a(x))
    assert torch.equal(program.step(x, y).objectives["a.loss"], rows_last(found, y).detach())


def test_a_batch_as_large_as_another_dimension_changes_nothing():
    """[T,B,V] with B equal to V would be PyTorch's [B,C,T] as well."""
    program = program_of(2, 3, batch=1)
    for size in (4, 3):
        x, y = batch(size)[0], torch.randint(3, (2, size))
        wanted = rows_last(program.model(x), y)
        assert torch.equal(program.step(x, y).loss, wanted.detach())


@pytest.mark.parametrize(("loss", "function"), [("mse", F.mse_loss), ("l1", F.l1_loss)])
def test_one_hot_pixels_have_their_classes_where_the_output_has(loss, function):
    program = program_of(3, 4, 5, loss=loss)
    x, y = batch()[0], torch.randint(3, (5, 4, 5))
    wanted = function(program.model(x), F.one_hot(y, 3).permute(0, 3, 1, 2).float())
    assert torch.equal(program.step(x, y).loss, wanted.detach())


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((3,), "cross_entropy of f32[B,3], its classes in dimension 1"),
        ((4, 4), "cross_entropy of f32[B,4,4], its classes in dimension 1"),
        (
            (7, 3),
            "cross_entropy of f32[B,7,3], its classes in dimension 1 for class indices [B,3], "
            "in dimension 2 for class indices [B,7]",
        ),
    ],
)
def test_the_certificate_says_how_the_loss_reads_the_output(shape, text):
    certificate = program_of(*shape, verify=True).certificate
    assert f"loss {text} trains with" in " ".join(certificate.text(verbose=True).split())
    assert json.loads(certificate.to_json())["loss"] == text


def wrong(size: int, value: Any) -> Tensor:
    y = torch.zeros(size, dtype=torch.long)
    y[-1] = value
    return y


@pytest.mark.parametrize(
    ("loss", "target", "words"),
    [
        ("cross_entropy", wrong(5, 3), r"class index 3 in the target: the output f32\[B,3\] has 3 classes"),
        (
            "cross_entropy",
            wrong(5, -1),
            r"class index -1 .* give indices 0 to 2, or -100 where there is none",
        ),
        ("mse", wrong(5, -100), "class index -100"),
        ("cross_entropy", torch.zeros(5), r"class indices \[B\] as torch.int64, or probabilities \[B,3\]"),
        ("cross_entropy", torch.zeros(5).int(), r"found a tensor of shape \[5\] and dtype torch.int32"),
        ("cross_entropy", wrong(4, 0), r"found a tensor of shape \[4\]"),
        ("cross_entropy", None, "found NoneType"),
        ("mse", torch.zeros(5), r"class indices \[B\] as torch.int64, or numbers \[B,3\]"),
    ],
)
@pytest.mark.parametrize("method", ["bp", "dtp"])
def test_a_target_that_the_loss_cannot_read_changes_nothing(method, loss, target, words):
    program = compiled(mlp(), method, ["relu1", "relu2"], loss=loss, verify=False)
    before = snapshot(program.root)
    with pytest.raises(RunError, match=words) as caught:
        program.step(batch()[0], target)
    assert "Nothing has changed" in str(caught.value)
    assert same(before, snapshot(program.root))
    program.step(*batch())


def test_ignored_class_indices_and_probabilities_are_read():
    program = compiled(mlp(), "bp", ["relu1"], verify=False)
    x = batch()[0]
    for target in (wrong(5, -100), torch.rand(5, 3).softmax(-1)):
        wanted = F.cross_entropy(program.model(x), target)
        assert torch.equal(program.step(x, target).loss, wanted.detach())
