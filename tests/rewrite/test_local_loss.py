"""The part of a loss that reads the prediction: what a module's head trains on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locc
from locc.errors import LoccError, MethodError
from support import sgd


class Auxiliary(nn.Module):
    """Returns logits, an auxiliary classifier's logits, and features, as GoogLeNet and DeepLab do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"out": self.head(torch.tanh(h)), "aux": self.aux(h), "features": h}


def ce(output: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(output["out"], y)


LOSSES: list[Callable[[Any, Tensor], Tensor]] = [
    lambda o, y: ce(o, y) + 0.3 * F.cross_entropy(o["aux"], y),
    lambda o, y: 0.4 * F.cross_entropy(o["aux"], y) + ce(o, y),
    lambda o, y: sum([ce(o, y), o["features"].square().mean() / 2]),
    lambda o, y: ce(o, y) - o["features"].mean() * 3,
    lambda o, y: -(o["features"].mean() - ce(o, y)),
    lambda o, y: torch.add(ce(o, y), -F.kl_div(o["aux"].log_softmax(1), o["features"][:, :3].softmax(1))),
]


@pytest.mark.parametrize("number", range(len(LOSSES)))
def test_terms_that_read_another_output_are_left_out(number: int) -> None:
    model, x, y = Auxiliary().double(), torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    options: dict[str, Any] = {"example_inputs": x, "optimizer": sgd(), "head": "linear", "seed": 0}
    program = locc.compile(model, "dgl", ["body"], loss=LOSSES[number], **options)
    (head,) = program.root.aux.values()
    wanted = F.cross_entropy(head(model.body(x)), y)
    whole = LOSSES[number](model(x), y)
    report = program.step(x, y)
    torch.testing.assert_close(report.objectives["body.loss"], wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(report.loss, whole, atol=1e-12, rtol=0)


def test_a_weighted_sum_with_an_output_that_a_head_does_not_give_is_refused() -> None:
    def weighted(output: dict[str, Tensor], y: Tensor) -> Tensor:
        return torch.add(output["features"].mean(), ce(output, y), alpha=0.5)

    with pytest.raises(MethodError, match="loss 'weighted' has no part that reads the model's prediction"):
        locc.compile(Auxiliary(), "dgl", ["body"], loss=weighted, example_inputs=torch.randn(6, 4))


def test_a_loss_without_such_a_part_is_refused_when_compiling() -> None:
    def distils(output: dict[str, Tensor], y: Tensor) -> Tensor:
        return (output["out"] * output["aux"].detach()).mean()

    model = Auxiliary()
    with pytest.raises(MethodError, match="loss 'distils' has no part that reads the model's prediction"):
        locc.compile(model, "dgl", ["body"], loss=distils, example_inputs=torch.randn(6, 4))
    locc.compile(model, "bp", ["body"], loss=distils, example_inputs=torch.randn(6, 4))


class Own(nn.Module):
    """Computes its own loss from labels, as Hugging Face models do, with a term that no head can give."""

    def __init__(self, penalty: float = 0.1) -> None:
        super().__init__()
        self.a, self.b, self.penalty = nn.Linear(4, 6), nn.Linear(6, 3), penalty
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = torch.tanh(self.a(x))
        logits = self.b(h)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.float().view(-1, 3), labels.view(-1), self.weight)
        loss += self.penalty * self.b(h).square().mean()
        return {"loss": loss, "logits": logits}


def test_the_models_own_loss_is_computed_once_more_on_what_a_head_gives() -> None:
    model, batch = Own(), {"x": torch.randn(6, 4), "labels": torch.randint(3, (6,))}
    twin = copy.deepcopy(model)
    program = locc.compile(
        model, "dgl", ["a"], loss="model", example_inputs=batch, optimizer=sgd(), head="linear"
    )
    (head,) = program.root.aux.values()
    wanted = F.cross_entropy(head(model.a(batch["x"])), batch["labels"], model.weight)
    report = program.step(batch)
    torch.testing.assert_close(report.objectives["a.loss"], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(report.loss, twin(**batch)["loss"], atol=1e-6, rtol=0)
    told = "the model's own, its output 'loss'; a head trains on the part of it that reads 'b'"
    assert program.certificate.loss == told
    assert not program.certificate.warnings


def test_a_loader_of_dicts_keeps_its_labels_within() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 4)
    data = [{"x": x, "labels": (x[:, 0] > 0).long()}]
    program = locc.compile(Own(0.0), "dgl", ["a"], loss="model", optimizer=sgd(1.0))
    history = program.fit(data, epochs=60, progress=False)
    assert history.epochs[-1].loss < 0.3 < history.epochs[0].loss
    assert program.evaluate(data).loss < 0.3
    assert program.diagnose(data).steps == 1


def test_a_model_that_returns_no_loss_is_told_so() -> None:
    with pytest.raises(LoccError, match="loss='model' takes the loss that the model's forward returns"):
        locc.compile(Own(), "dgl", ["a"], loss="model", example_inputs=torch.randn(6, 4))
