"""Small models, one for each thing that wrappers usually break on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.case import BATCH, Case, case, classes, normal


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10)])
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(3, 8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor, text: Tensor, scale: float = 2.0) -> Tensor:
        x = torch.relu(self.left(image)) * scale + self.right(text)
        return self.head(torch.relu(self.mix(x)))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.body(x))
        return {"logits": self.head(hidden), "extra": (self.aux(hidden), None), "version": 3}


@dataclass
class Prediction:
    logits: Tensor
    hidden: Tensor | None = None
    name: str = "prediction"


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Inner(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Prediction:
        inner = self.body(x)
        return Prediction(self.head(inner.logits), inner.logits)


class Inner(nn.Module):
    """A leaf that returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Prediction:
        return Prediction(torch.tanh(self.linear(x)))


class RunningMean(nn.Module):
    """Writes its buffers in forward: one in place, one by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.mean: Tensor
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.training:
            self.seen += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.head(torch.relu(x - self.mean))


class NoGradStatistics(nn.Module):
    """Updates a buffer under no_grad between its submodules, and gates by a value without a tape."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("level", torch.ones(()))
        self.level: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        with torch.no_grad():
            self.level.mul_(0.9).add_(x.abs().mean(), alpha=0.1)
            gate = torch.sigmoid(self.gate(x))
        return self.head(torch.relu(x) * gate / self.level)


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.first(x)), 0.3, training=self.training)
        x = self.drop(torch.relu(self.second(x)))
        return self.head(x + 0.1 * torch.randn_like(x) if self.training else x)


def hooked() -> nn.Module:
    model = MLP()
    model.layers[1].register_forward_hook(lambda module, args, output: output * 2)
    model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, output: output - 1)
    return model


class Scale(torch.autograd.Function):
    """Identity forward; the gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Scale.apply(x, 0.25)  # type: ignore[no-any-return]


class CustomFunction(nn.Module):
    """A custom autograd function inside a submodule, and one between submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), Scaled(), nn.Tanh())
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = Scale.apply(self.body(x), 3.0)
        return self.head(torch.relu(self.middle(x)))


class Branching(nn.Module):
    """Takes a data-dependent branch: fine inside a submodule that stays closed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if x.mean().item() > 0:
            return torch.relu(x)
        return torch.tanh(x)


class BranchInLeaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 8), Branching(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


class BranchBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 0:
            x = self.block(x)
        return self.head(x)


class ItemBetween(BranchBetween):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x / x.abs().max().item()
        return self.head(self.block(x))


class Branches(nn.Module):
    """Changes the list that it is given, as HRNet's stages do, and returns one of the new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(6, 6), nn.Linear(8, 8)])
        self.mix = nn.Linear(14, 8)

    def forward(self, x: list[Any]) -> list[Tensor]:
        for i, branch in enumerate(self.branches):
            x[i] = torch.relu(branch(x[i]))
        x[2] = None
        return [x[0], self.mix(torch.cat(x[:2], 1))]


class ChangedList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage, self.head = nn.Linear(6, 8), Branches(), nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Any] = [x, self.stem(x), x]
        _, mixed = self.stage(parts)
        if parts[2] is None:
            mixed = torch.cat([mixed, parts[0]], 1)
        return self.head(mixed)


class Notes:
    """A plain mutable object that modules write to."""

    def __init__(self) -> None:
        self.carry: Tensor | None = None


class Writer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 8)

    def forward(self, x: Tensor, notes: Notes) -> Tensor:
        x = torch.tanh(self.linear(x))
        notes.carry = x if notes.carry is None else notes.carry + x
        return notes.carry


class PassesNotes(nn.Module):
    """Hands a mutable object from module to module, which only torch.export can see through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Writer(6), Writer(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        notes = Notes()
        x = self.first(x, notes)
        return self.head(self.second(x, notes))


def pair() -> Any:
    return normal(6)(), normal(3, seed=5)()


def keywords() -> Any:
    return {"text": normal(3, seed=5)(), "image": normal(6)()}


def logits(output: Any, target: Tensor) -> Tensor:
    found = output["logits"] if isinstance(output, dict) else output.logits
    return F.cross_entropy(found, target)


FOUR = classes(4)

CASES: list[Case] = [
    case("mlp", MLP, normal(6), FOUR, [["layers.0"], ["layers.0", "layers.1", "layers.2"]], tags="flat",
         origins=("fx", "fx")),
    case("two_inputs", TwoInputs, pair, FOUR, [["left"], ["left", "mix"]], tags="multi-input"),
    case("keyword_inputs", TwoInputs, keywords, FOUR, [["mix"]], tags="multi-input keywords"),
    case("dict_output", DictOutput, normal(6), FOUR, [["body"]], logits, "structured"),
    case("dataclass_output", DataclassOutput, normal(6), FOUR, [["body"], ["body.linear"]],
         logits, "structured"),
    case("running_mean", RunningMean, normal(6), FOUR, [["body"]], tags="buffer", origins=("concrete",)),
    case("no_grad_statistics", NoGradStatistics, normal(6), FOUR, [["body"]],
         tags="buffer", origins=("concrete",)),
    case("functional_dropout", FunctionalDropout, normal(6), FOUR, [["first"], ["first", "second"]],
         tags="dropout"),
    case("hooks", hooked, normal(6), FOUR, [["layers.0"], ["layers.1", "layers.2"]], tags="hooks"),
    case("custom_function", CustomFunction, normal(6), FOUR, [["body"], ["body.0", "middle"]], tags="custom"),
    case("branch_in_leaf", BranchInLeaf, normal(6), FOUR, [["stem"], ["stem", "block"]],
         tags="data-dependent"),
    case("changed_list", ChangedList, normal(6), FOUR, [["stem"], ["stage"]], tags="structured",
         origins=("concrete", "concrete")),
    case("mutable_object", PassesNotes, normal(6), FOUR, [["first"]], tags="export", origins=("export",)),
]  # fmt: skip

REFUSED: list[Case] = [
    case("branch_between", BranchBetween, normal(6), FOUR, [["stem"]]),
    case("item_between", ItemBetween, normal(6), FOUR, [["stem"]]),
]

assert normal(1)().shape[0] == BATCH
