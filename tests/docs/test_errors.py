"""The page on errors: each class is on it, arises as it says, and with the remedy that it gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import locc
from locc import errors
from locc.ir import TrainingGraph
from rules import Rule, mean_square, sent
from support import batch, compiled, mlp, sgd

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M))
CLASSES = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.LoccError)}


def words(text: str) -> str:
    return " ".join(text.split())


def net(**options: Any) -> locc.Program:
    options = {"verify": False, "optimizer": sgd(), **options}
    return compiled(mlp(), options.pop("method", "dgl"), ["relu1", "relu2"], **options)


def nan() -> None:
    program = net()
    nn.init.constant_(program.model.third.bias, float("inf"))
    program.step(*batch())


def one_sample() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    compiled(model, "dgl", ["0"], verify=False).step(*batch(1))


def around() -> None:
    program = net()
    program.model.second.register_forward_pre_hook(lambda *_: program.step(*batch()) and None)
    program.step(*batch())


def branching() -> None:
    model = mlp()
    model.second.register_forward_hook(lambda _, x, y: y if y.sum() > 0 else 2 * y)
    compiled(model, "dgl", ["relu2"], verify=False, backend="inductor", strict=True).step(*batch())


def uncut(ir: TrainingGraph) -> None:
    value = sent(ir, "relu1")
    ir.objective("relu1", ir.emit("relu2", mean_square, value), "size")


class InPlace(nn.Module):
    """Changes what its backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)).add_(1))


def leaky() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
            self.b.register_forward_pre_hook(lambda _, x: (x[0] + self.a.weight.sum(),))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    compiled(Leaky(), "dgl", ["a"])


def other_program(tmp: Path) -> None:
    net(method="dgl").save(tmp / "run.st")
    net(method="bp").load(tmp / "run.st")


def missing_folder(tmp: Path) -> None:
    net().export_onnx(tmp / "none" / "model.onnx")


@dataclass(frozen=True)
class Case:
    """How an error arises, and the text that message and page have in common."""

    error: str
    provoke: Callable[..., object]
    text: str


CASES = [
    Case(
        "CaptureError",
        lambda: compiled(InPlace(), "bp", ["a"]),
        "the model itself fails on the example inputs, in train mode and before any capture: RuntimeError: "
        "one of the variables needed for gradient computation has been modified by an inplace operation",
    ),
    Case("SplitError", lambda: compiled(mlp(), "bp", ["relu3"]), "matches no submodule; nearest: "),
    Case(
        "MethodError",
        lambda: locc.method("dtp", sigmaa=1),
        "method 'dtp' has no option 'sigmaa'; nearest: 'sigma'",
    ),
    Case(
        "MethodError",
        lambda: net(optimizer=lambda _: sgd()(nn.Linear(2, 2).parameters())),
        "build it from its argument, not from model.parameters()",
    ),
    Case("GraphError", lambda: net(method=Rule(uncut)), "without stop_gradient"),
    Case("LocalityError", leaky, "remedy: detach the value where it enters the module"),
    Case("RunError", nan, ""),
    Case("RunError", one_sample, ""),
    Case("RunError", lambda: net().step(batch()[0], torch.full((5,), 3)), ""),
    Case("RunError", lambda: net(method="sim").step(batch()[0], torch.zeros(5)), ""),
    Case("RunError", lambda: net().step(torch.zeros(5, 7), batch()[1]), ""),
    Case("RunError", lambda: net().step(*batch(0)), ""),
    Case("RunError", around, ""),
    Case(
        "RunError", branching, "Leave out strict=True, and that runs eagerly; or change what the reason names"
    ),
    Case("CheckpointError", other_program, "Compile with the same model, splits and options"),
    Case("ExportError", missing_folder, ""),
    Case("LoccError", lambda: net(loss="crossentropy"), ""),
    Case("LoccError", lambda: net(schedule="lockstepp"), ""),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.error}" for i, case in enumerate(CASES)])
def test_an_error_arises_as_the_page_says(case: Case, tmp_path: Path) -> None:
    needs_folder = case.provoke in (other_program, missing_folder)
    with pytest.raises(locc.LoccError) as caught:
        case.provoke(tmp_path) if needs_folder else case.provoke()
    assert type(caught.value).__name__ == case.error
    found = words(str(caught.value)).replace(str(tmp_path), "out")
    text = case.text or found
    assert text in found
    assert text in words(SECTIONS[case.error])


def test_every_class_is_on_the_page_with_when_and_remedy() -> None:
    assert set(SECTIONS) == CLASSES == {case.error for case in CASES}
    for name, section in SECTIONS.items():
        assert "**When.**" in section, name
        assert "**Remedy.**" in section, name
        assert f"| [`{name}`](#{name.lower()})" in PAGE
