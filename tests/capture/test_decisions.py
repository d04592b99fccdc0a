"""Decisions on values of the inputs between closed modules: asserts, a flag, and what stays refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.capture import capture
from locc.errors import CaptureError, ExportError, RunError
from locc.ir.captured import Captured, Inputs, Root


class Tagger(nn.Module):
    """Embeds tokens; `between` gets the ids, the mask and the hidden values between two closed modules."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Embedding(8, 4), nn.Linear(4, 3), between

    def forward(self, ids: Tensor, weight: Tensor) -> Any:
        return self.b(self.between(self.a(ids), ids, weight).mean(1))


def batch(ids: int = 3, weight: float = 0.5) -> tuple[Tensor, Tensor]:
    return torch.full((4, 5), ids), torch.full((4, 5, 1), weight)


def take(between: Any) -> Captured:
    torch.manual_seed(0)
    return capture(Root(Tagger(between)), Inputs(batch(), {}), frozenset({"model"}))


def longest(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    numbers = ids * 1
    numbers[:, 0] = 0
    assert numbers.max().item() <= h.size(1)
    return h * weight


def bounded(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    if weight.max() > 1:
        raise ValueError("weights up to 1")
    return h * weight


def shifted(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    moved = ids.new_zeros(h.shape[:2])
    moved[:, 1:] = ids[:, :-1]
    assert torch.all(moved < 7).item(), "small ids only"
    return h * weight


def flagged(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    special = (ids == 7).any().item()
    return h + 1 if special else h


@pytest.mark.parametrize(
    ("between", "other", "bad", "line"),
    [
        (longest, batch(5), batch(6), "numbers.max"),
        (shifted, batch(6), batch(7), "torch.all"),
        (bounded, batch(3, 1.0), batch(3, 1.5), "weight.max"),
    ],
)
def test_a_check_that_only_raises_is_made_on_each_batch(
    between: Any, other: Any, bad: Any, line: str
) -> None:
    found = take(between)
    assert not found.notes
    kept = other[0].clone()
    found.signature.bind(Inputs(other, {}))
    assert torch.equal(other[0], kept)
    with pytest.raises(RunError, match=rf"refuses this batch, at .*test_decisions.py:\d+: .*{line}"):
        found.signature.bind(Inputs(bad, {}))


def test_a_branch_on_ids_holds_for_batches_that_agree_and_is_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tagger(flagged)
    program = locc.compile(model, "bp", ["a"], example_inputs=batch(3))
    assert ["each batch is held to it" in note for note in program.ir.captured.notes] == [True]
    program.step(batch(5), torch.zeros(4, dtype=torch.long))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        RunError, match=r"(?s)was False for the example inputs.*is True for this batch.*no split"
    ):
        program.step(batch(7), torch.zeros(4, dtype=torch.long))
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(ExportError, match="a file would hold one of the branches"):
        program.export_onnx(tmp_path / "model.onnx")


def on_measured(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return h if weight.mean() > 0 else -h


def on_hidden(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    assert not torch.isnan(h).any()
    return h


def on_chance(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    assert torch.rand(3).sum() > 0
    return h


def on_what_hidden_values_were_written_into(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    mixed = weight * 1
    mixed[:, 0] = h[:, 0, :1].detach()
    assert mixed.max() < 100
    return h


def on_the_batch_size(h: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return h if ids.sum() > 46 else h * 2


@pytest.mark.parametrize(
    "between", [on_measured, on_hidden, on_chance, on_what_hidden_values_were_written_into, on_the_batch_size]
)
def test_what_another_batch_may_decide_otherwise_or_the_inputs_do_not_tell_is_refused(between: Any) -> None:
    with pytest.raises(CaptureError, match=r"(?s)steer.* the forward.*test_decisions.py:\d+.*torch.where"):
        take(between)
