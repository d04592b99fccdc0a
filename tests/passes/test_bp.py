"""`bp` through the IR equals `loss.backward()`, on every model of the zoo and wherever it is cut."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
import support
from locc import Program
from locc.losses import Loss
from zoo import CASES, Case

STEPS = 3
EXACT = {"atol": 1e-12, "rtol": 1e-12}


class Recorder(torch.optim.Optimizer):
    """SGD that keeps a copy of the gradients that it is given."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.05})
        self.seen: list[dict[int, Tensor]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.seen.append({id(p): p.grad.clone() for p in held})
        for p in held:
            p -= self.param_groups[0]["lr"] * p.grad


@pytest.fixture(autouse=True)
def _no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways must compute the same function: what draws random numbers itself is told so here."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda input, *_, **__: input)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.zeros_like(x))


def double(value: Any) -> Any:
    def cast(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return torch.utils._pytree.tree_map(cast, value)


def exact_model(case: Case) -> nn.Module:
    """The case's model in float64, and without dropout in what does not go through F.dropout."""
    model = case.build().double().train()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if ("drop" in name or name == "p") and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def call(model: nn.Module, x: Any) -> Any:
    inputs = locc.ir.Inputs.of(model, x)
    return model(*inputs.args, **inputs.kwargs)


def reference(case: Case, model: nn.Module, x: Any, y: Any) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Train `model` by `loss.backward()`; yield the loss and the gradients of each step."""
    for _ in range(STEPS):
        loss = Loss(case.loss)(call(model, x), y)
        model.zero_grad()
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
        yield loss.item(), found


def compiled(case: Case, model: nn.Module, splits: Iterable[str], x: Any) -> Program:
    policy = "owner" if "tied" in case.tags or "shared" in case.tags else "error"
    return locc.compile(
        model,
        "bp",
        list(splits),
        loss=case.loss,
        example_inputs=x,
        optimizer=Recorder,
        tied=policy,
        verify=False,
    )


def compare(case: Case, model: nn.Module, twin: nn.Module, program: Program, x: Any, y: Any) -> None:
    names = {id(p): n for n, p in model.named_parameters()}
    for number, (loss, wanted) in enumerate(reference(case, twin, x, y)):
        report = program.step(x, y)
        assert report.loss.item() == pytest.approx(loss, abs=1e-12)
        found = {names[k]: g for o in program.optimizers.values() for k, g in o.seen[number].items()}
        for name, gradient in wanted.items():
            given = found.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(
                given, gradient, **EXACT, msg=lambda m, n=name: f"gradient of {n}: {m}"
            )
        for name in found.keys() - wanted.keys():
            assert not found[name].any(), f"{name} has a gradient, and backward() gives it none"
    theirs, own = twin.state_dict(), model.state_dict()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, theirs[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


LISTED = [pytest.param(c, s, id=f"{c.name}-{'+'.join(s)}") for c in CASES for s in c.splits]


@pytest.mark.parametrize(("case", "splits"), LISTED)
def test_bp_equals_backward_at_the_listed_splits(case: Case, splits: tuple[str, ...]) -> None:
    model, x, y = exact_model(case), double(case.inputs()), double(case.target(4))
    twin = copy.deepcopy(model)
    program = compiled(case, model, splits, x)
    assert len(program.ir.modules) == len(splits) + 1
    compare(case, model, twin, program, x, y)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bp_equals_backward_at_random_splits(case: Case) -> None:
    """Up to three random choices of cuts; one that describes no partition is refused, never miscompiled."""
    draw = random.Random(case.name)
    names = [n for n, m in case.build().named_modules() if n and not isinstance(m, nn.ModuleList)]
    x, y = double(case.inputs()), double(case.target(4))
    tried = admitted = 0
    for tried in itertools.count(1):
        model = exact_model(case)
        twin = copy.deepcopy(model)
        chosen = draw.sample(names, min(len(names), draw.randint(1, 4)))
        try:
            program = compiled(case, model, chosen, x)
        except (locc.SplitError, locc.CaptureError):
            program = None
        if program is not None:
            admitted += 1
            compare(case, model, twin, program, x, y)
        if admitted == 2 or tried == 5:
            break


def test_bp_equals_backward_without_splits() -> None:
    case = CASES[0]
    model, x, y = exact_model(case), double(case.inputs()), double(case.target(4))
    compare(case, model, copy.deepcopy(model), compiled(case, model, (), x), x, y)


class InPlace(nn.Module):
    """Changes views of a value in place, without using what the calls return; so does a buffer's row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("history", torch.zeros(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.a(x)).clone()
        z[:, 0].mul_(2)
        z.add_(1)
        part = z[:, 1:]
        part.mul_(0.5)
        h = self.b(z)
        with torch.no_grad():
            self.history[0].add_(h.detach().mean(0))
        return self.c(h)


@pytest.mark.parametrize("splits", [(), ("b",), ("a",)])
def test_bp_equals_backward_through_changes_in_place(splits: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    case = Case("in_place", InPlace, lambda: x, lambda _: y, "cross_entropy", ())
    model = exact_model(case)
    compare(case, model, copy.deepcopy(model), compiled(case, model, splits, x), x, y)


ALONE = ("altmin", "cdni", "ddtp-linear", "ddtp-rhl", "dfa", "dni", "dtp", "dtp-drl", "tp")


@pytest.mark.parametrize("method", ALONE)
def test_one_module_under_another_method_is_backpropagation(method: str) -> None:
    """Bit for bit; of proxy methods the conformance tests say so."""
    model, (x, y) = support.mlp(), support.batch()
    twin = copy.deepcopy(model)
    one, two = (
        support.compiled(m, name, optimizer=support.sgd()) for m, name in ((model, method), (twin, "bp"))
    )
    for _ in range(3):
        one.step(x, y)
        two.step(x, y)
    assert support.same(model.state_dict(), twin.state_dict())
