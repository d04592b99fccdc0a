"""The part of a loss that reads the prediction: what a module's head trains on."""

from __future__ import annotations

import copy
import warnings
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
    lambda o, y: locc.losses.cross_entropy(o["out"], y) + 0.3 * locc.losses.cross_entropy(o["aux"], y),
    lambda o, y: -(o["features"].mean() - ce(o, y)),
    lambda o, y: (
        ce(o, y) - 0.5 * torch.sum(1 + o["aux"] - o["features"].pow(2).mean() - o["aux"].exp())
    ),  # VAE
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
    told = "the model's own, its output 'loss'; a head trains on the part of it that reads 'logits'"
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


class Tasks(nn.Module):
    """Class scores for each pixel and a depth, from one trunk."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.body, self.more = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.seg, self.depth, self.aux = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 1, 1), nn.Conv2d(4, 3, 1)
        self.as_tuple = as_tuple

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.more(torch.tanh(self.body(x))))
        found = {"seg": self.seg(h), "depth": self.depth(h), "aux": self.aux(h), "features": h}
        return (found["seg"], found["depth"], h) if self.as_tuple else found


X = torch.randn(5, 2, 6, 6, dtype=torch.float64)
SEG, DEPTH = torch.randint(3, (5, 6, 6)), torch.rand(5, 1, 6, 6, dtype=torch.float64)


def of_tasks(o: Any, y: Any) -> Tensor:
    seg, depth, features = (0, 1, 2) if isinstance(o, tuple) else ("seg", "depth", "features")
    aux = 0.0 if isinstance(o, tuple) else 0.4 * F.cross_entropy(o["aux"], y[seg])
    return (
        F.cross_entropy(o[seg], y[seg])
        + 0.5 * F.mse_loss(o[depth], y[depth])
        + aux
        + o[features].square().mean()
        + 0.1 * F.mse_loss(o[seg].mean(1, keepdim=True), o[depth])
    )


class Towers(nn.Module):
    """Two inputs through one encoder, an output each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.more = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.more(torch.tanh(self.encoder(a))), self.more(torch.tanh(self.encoder(b)))


def contrast(output: Any, _: Any) -> Tensor:
    a, b = output
    return F.cross_entropy(a @ b.T, torch.arange(len(a)))


def test_a_head_for_an_output_that_does_not_read_its_value_is_told_of() -> None:
    inputs = (torch.randn(5, 4), torch.randn(5, 4))
    advice = {
        method: " ".join(
            locc.compile(Towers(), method, ["encoder"], loss=contrast, example_inputs=inputs).built.advice
        )
        for method in ("dgl", "dtp")
    }
    assert "a local head of module 'encoder' predicts output '1' from 'encoder'" in advice["dgl"]
    assert "local head" not in advice["dtp"]


class Views(nn.Module):
    """Two views of a sample through one encoder, in one batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder, self.more, self.kind = nn.Linear(4, 6), nn.Linear(6, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        both = {
            "cat": lambda: torch.cat([x, -x]),
            "repeat": lambda: x.repeat(2, 1),
            "stack": lambda: torch.stack([x, -x], 1).flatten(0, 1),
        }[self.kind]()
        h = self.more(torch.tanh(self.encoder(both)))
        a, b = h.unflatten(0, (-1, 2)).unbind(1) if self.kind == "stack" else h.chunk(2)
        return a * b


@pytest.mark.parametrize("method", ["dgl", "predsim", "dfa"])
def test_samples_in_blocks_are_not_taken_for_each_other(method: str) -> None:
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    for kind in ("cat", "repeat"):
        with pytest.raises(MethodError, match=rf"the samples in blocks.* since '{kind}'.*torch\.stack"):
            locc.compile(Views(kind), method, ["encoder"], example_inputs=x)
    locc.compile(Views("stack"), method, ["encoder"], example_inputs=x).step(x, y)
    locc.compile(Views("cat"), "bp", ["encoder"], example_inputs=x).step(x, y)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_each_task_has_a_head_and_the_loss_reads_them_together(as_tuple: bool) -> None:
    model = Tasks(as_tuple).double()
    y: Any = (SEG, DEPTH) if as_tuple else {"seg": SEG, "depth": DEPTH}
    with warnings.catch_warnings(record=True) as warned:
        program = locc.compile(
            model, "dgl", ["body"], loss=of_tasks, example_inputs=X, optimizer=sgd(), head="linear"
        )
    assert not warned  # of targets that were made up
    seg, depth = program.root.aux.values()
    h = model.body(X)
    given = {"seg": seg(h), "depth": depth(h)}
    wanted = F.cross_entropy(given["seg"], SEG) + 0.5 * F.mse_loss(given["depth"], DEPTH)
    wanted = wanted + 0.1 * F.mse_loss(given["seg"].mean(1, keepdim=True), given["depth"])
    leaves = [model.body.weight, seg.linear.weight, depth.linear.weight]
    moved = [p - 0.1 * g for p, g in zip(leaves, torch.autograd.grad(wanted, leaves), strict=True)]
    report = program.step(X, y)
    torch.testing.assert_close(report.objectives["body.loss"], wanted.detach(), atol=1e-12, rtol=0)
    for leaf, value in zip(leaves, moved, strict=True):
        torch.testing.assert_close(leaf.detach(), value, atol=1e-12, rtol=0)
    names = "'0' and '1'" if as_tuple else "'seg' and 'depth'"
    assert program.certificate.loss.endswith(f"reads {names}")
    assert "stand-in" not in str(program.certificate)


class Pair(nn.Module):
    """Two vectors of class scores; with labels among the inputs it computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor, start: Tensor | None = None, end: Tensor | None = None) -> dict[str, Tensor]:
        h = torch.tanh(self.a(x))
        found = {"start": self.b(h), "end": self.c(h)}
        if start is None or end is None:
            return found
        return found | {
            "loss": (F.cross_entropy(found["start"], start) + F.cross_entropy(found["end"], end)) / 2
        }


VECTORS = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
START, END = torch.tensor([0, 2, 1, 1, 0, 2]), torch.tensor([4, 0, 3, 1, 1, 2])
BOTH = {"start": START, "end": END}


def of_pair(o: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(o["start"], y["start"]) + F.cross_entropy(o["end"], y["end"])


def pair(method: str, loss: Any = of_pair, **options: Any) -> Any:
    model = Pair().double()
    return locc.compile(model, method, ["a"], loss=loss, example_inputs=VECTORS, optimizer=sgd(), **options)


def test_the_models_own_loss_of_two_predictions_is_computed_on_two_heads() -> None:
    batch = {"x": VECTORS, **BOTH}
    program = locc.compile(Pair().double(), "dgl", ["a"], loss="model", example_inputs=batch, optimizer=sgd())
    start, end = program.root.aux.values()
    h = program.model.a(VECTORS)
    wanted = (F.cross_entropy(start(h), START) + F.cross_entropy(end(h), END)) / 2
    torch.testing.assert_close(program.step(batch).objectives["a.loss"], wanted.detach(), atol=1e-12, rtol=0)


def test_one_prediction_may_be_named() -> None:
    for loss, y in ((of_pair, BOTH), ("cross_entropy", END)):
        program = pair("dgl", loss, prediction="end", local_loss=None)
        (head,) = program.root.aux.values()
        wanted = F.cross_entropy(head(program.model.a(VECTORS)), END)
        output = program.model(VECTORS)
        report = program.step(VECTORS, y)
        torch.testing.assert_close(report.objectives["a.loss"], wanted.detach(), atol=1e-12, rtol=0)
        whole = of_pair(output, BOTH) if loss is of_pair else F.cross_entropy(output["end"], END)
        torch.testing.assert_close(report.loss, whole.detach(), atol=1e-12, rtol=0)
    with pytest.raises(MethodError, match=r"prediction='ends' names no .* nearest: 'end'"):
        pair("dgl", prediction="ends")


@pytest.mark.parametrize("method", ["al", "cdni"])
def test_a_rule_of_one_prediction_asks_which(method: str) -> None:
    with pytest.raises(
        MethodError, match="the loss reads 'start' and 'end'; name one, as in prediction='start'"
    ):
        pair(method)
    program = pair(method, prediction="end")
    before = program.model.a.weight.clone()
    for _ in range(2):  # a synthesiser starts at zero
        program.step(VECTORS, BOTH)
    assert not torch.equal(program.model.a.weight, before)


@pytest.mark.parametrize("method", ["dgl", "predsim", "dfa", "fa", "dni", "dtp", "altmin"])
def test_every_task_trains_the_module_below(method: str) -> None:
    """What the module below learns changes with the labels of either task."""
    moved = []
    for y in (BOTH, BOTH | {"start": START.roll(1)}, BOTH | {"end": END.roll(1)}):
        torch.manual_seed(0)
        program = pair(method, seed=0)
        for _ in range(2):
            program.step(VECTORS, y)
        moved.append(program.model.a.weight.clone())
    assert not torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_direct_feedback_is_the_sum_over_the_tasks() -> None:
    program = pair("dfa")
    weight, h = program.model.a.weight, program.model.a(VECTORS)
    output = program.model(VECTORS)
    errors = torch.autograd.grad(of_pair(output, BOTH), [output["start"], output["end"]])
    delta = sum(m(e) for m, e in zip(program.root.aux.values(), errors, strict=True))
    assert isinstance(delta, Tensor)
    (gradient,) = torch.autograd.grad(h, weight, delta)
    wanted = weight - 0.1 * gradient
    program.step(VECTORS, BOTH)
    torch.testing.assert_close(weight, wanted, atol=1e-12, rtol=0)


class Bounded(nn.Module):
    """Returns probabilities and features, as a VAE does, or a classifier with a likelihood as its loss."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Linear(4, 6), nn.Linear(6, 3), end

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        return self.end(self.b(h)), h


IDS, SHARES = torch.randint(3, (6,)), torch.rand(6, 3)


@pytest.mark.parametrize("method", ["dgl", "infopro", "pred"])
@pytest.mark.parametrize(
    ("end", "loss", "y"),
    [
        (torch.sigmoid, F.binary_cross_entropy, SHARES),
        (lambda z: nn.Sequential(nn.Identity(), nn.Sigmoid())(z).view(-1, 3), F.binary_cross_entropy, SHARES),
        (nn.Sequential(nn.Identity(), nn.Sigmoid()), F.binary_cross_entropy, SHARES),
        (lambda z: F.log_softmax(z, dim=1), F.nll_loss, IDS),
        (nn.LogSoftmax(dim=-1), F.nll_loss, IDS),
        (lambda z: z.softmax(1), lambda p, y: F.nll_loss(p.log(), y), IDS),
    ],
)
def test_a_head_is_bounded_as_the_prediction_is(method: str, end: Any, loss: Any, y: Tensor) -> None:
    """An unbounded one fails in the step, or makes a negative likelihood fall without end."""
    x = torch.randn(6, 4)
    program = locc.compile(
        Bounded(end),
        method,
        ["a"],
        loss=lambda o, y: loss(o[0], y),
        example_inputs=x,
        optimizer=sgd(0.5),
        verify=False,
        seed=0,
    )
    for _ in range(30):
        report = program.step(x, y)
    assert all(float(value) > 0 for value in report.objectives.values())


class Hidden(nn.Module):
    """A decoder that stays a leaf, and whose range nobody sees."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


def test_a_loss_that_takes_no_free_number_is_refused_when_compiling() -> None:
    def compiled(**options: Any) -> None:
        locc.compile(
            Bounded(Hidden()),
            "dgl",
            ["a"],
            loss=lambda o, y: F.binary_cross_entropy(o[0], y),
            example_inputs=torch.randn(6, 4),
            verify=False,
            **options,
        )

    with pytest.raises(MethodError, match=r"loss 'loss' does not take every number .* between 0 and 1"):
        compiled()
    compiled(local_loss="bce")
    compiled(head=lambda a, b: nn.Sequential(nn.Linear(6, 3), Hidden()))


@pytest.mark.parametrize(("head", "bounded"), [("linear", True), (lambda a, b: nn.Linear(6, 3), False)])
def test_a_head_of_the_users_own_is_left_as_it_is(head: Any, bounded: bool) -> None:
    given: dict[str, Any] = {"loss": "mse", "prediction": 0, "example_inputs": torch.randn(6, 4)}
    program = locc.compile(Bounded(torch.sigmoid), "dgl", ["a"], head=head, verify=False, **given)
    assert ("bounded = sigmoid(" in str(program.ir)) is bounded
