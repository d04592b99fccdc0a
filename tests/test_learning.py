"""Every method learns: each id on several networks, a few epochs of Adam, beside backpropagation.

Where a method is undefined on a network, compiling it says so, and that is all that is asked there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import locc
from examples.digits import digits
from examples.models import SmallCNN, SmallResNet, stage
from locc.reproduce.data import Batches
from locc.reproduce.networks import GPT, Block
from support import every_method

BEHIND = {
    "bcd2": 0.20,  # thirty sweeps, each held near the weights before it
    "bcd3": 0.30,
    "gim": 0.30,  # no label below the last module
    "dladmm": 0.20,
    **dict.fromkeys(["fa", "dfa", "ifa", "fixed-aux"], 0.15),  # errors through matrices that never learn
}
"""By how much of the accuracy a method may fall behind backpropagation, if not by that of the network."""

FURTHER = {
    # Fifty steps: synthesisers have seen few gradients, and gim no label below the head.
    ("small-mlp", "dni"): 0.25,
    ("small-conv", "dni"): 0.22,
    ("small-conv", "gim"): 0.37,  # 0.75 after thirty epochs; 0.80 below the head frozen as it starts
    # Fifty steps: half of what modules train on was made by those below before they had learnt anything.
    ("small-conv", "dgl-async"): 0.20,
    # Modules of one convolution: by hand, in plain PyTorch, it is as far behind; 0.95 after twenty epochs.
    ("conv", "dgl"): 0.12,
    ("conv", "dgl-async"): 0.12,
    # The rate: a hundred times the published one, at which modules run away from predictions. At 3e-4 and
    # four times as long dni reaches 0.50 of tokens, where its synthesiser sees one position and the gradient
    # comes from the next one (0.87 with one that mixes them), and 0.77 of rows.
    ("tokens", "dni"): 0.73,
    ("transformer", "dni"): 0.52,
    ("transformer", "cdni"): 0.20,
    # Symbols drawn one by one: nothing tells one from another position.
    ("tokens", "gim"): 0.80,
    # The mean over the sequence: with a flat head dfa reaches 0.95, ifa 0.81.
    ("transformer", "dfa"): 0.36,
    ("transformer", "ifa"): 0.65,
    ("residual", "dni"): 0.27,
    ("residual", "cdni"): 0.30,
    # The mean over the map hides feedback that differs at each position: with a flat head ifa reaches 0.97.
    ("residual", "dfa"): 0.35,
    ("residual", "ifa"): 0.60,
    # Eight channels that are not negative cannot part ten classes: with 32 it reaches 0.89. Of ten seeds it
    # is 0.18 to 0.30 behind, 0.25 in the mean.
    ("residual", "pair-proxy"): 0.30,
    # The width: by hand, in plain PyTorch, 0.49 to 0.59; with 32 channels both 0.74 to 0.95, of four seeds.
    ("residual", "fa"): 0.40,
}
"""The same where a method falls behind further, on one network."""

LONGER = {
    **dict.fromkeys([("tokens", "cdni"), ("transformer", "cdni")], 4),
    **dict.fromkeys([("transformer", method) for method in ("np-sg", "gim", "pred")], 4),
    **dict.fromkeys([("residual", method) for method in ("pred", "gim")], 3),
}
"""How many times as long as backpropagation a method trains that needs the steps and not more distance."""

PLAIN = ("admm", "bcd2", "bcd3", "dladmm")
"""Defined on chains without BatchNorm; made for full batches."""
SWEEPS = 30
TOKENS = {"tp": {"eta": 1e6}}
"""A mean over positions makes gradients small, and `tp` asks for a larger step then."""
NARROW = {"dni": {"width": 32}, "cdni": {"width": 32}}
"""Synthesisers of a thousand units would take most of the time."""
BEFORE = ("altmin", "pair-proxy")
"""These cut before the nonlinearity."""


class Rows(nn.Module):
    """A transformer that reads an image as the sequence of its rows."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def mlp(method: str, width: int = 64, depth: int = 3) -> tuple[nn.Module, list[str]]:
    norm = method not in PLAIN
    blocks = [
        nn.Sequential(nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU())
        for a, b in pairwise((64, *[width] * depth))
    ]
    before = f".{int(norm)}" if method in BEFORE else ""
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(width, 10)), [
        f"{k + 1}{before}" for k in range(depth)
    ]


def conv(method: str) -> tuple[nn.Module, list[str]]:
    before = ".1" if method in BEFORE else ""
    return SmallCNN(8), [f"layer{k}{before}" for k in (1, 2, 3)]


def small_conv(method: str) -> tuple[nn.Module, list[str]]:
    before = ".1" if method in BEFORE else ""
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(stage(1, 8, 2), stage(8, 16, 2), head), [f"{k}{before}" for k in (0, 1)]


def residual(method: str) -> tuple[nn.Module, list[str]]:
    return SmallResNet(8, 2), ["stem", "blocks.0"]


def transformer(method: str) -> tuple[nn.Module, list[str]]:
    return Rows(), ["embed", "blocks.0"]


def tokens(method: str) -> tuple[nn.Module, list[str]]:
    return GPT(vocabulary=10, context=8, width=32, depth=2), ["blocks.0", "blocks.1"]


@cache
def recall() -> tuple[Tensor, Tensor]:
    """Sequences of ten symbols, and for each place the symbol before it."""
    x = torch.randint(10, (1000, 8), generator=torch.Generator().manual_seed(0))
    return x, x.roll(1, 1).index_fill(1, torch.tensor([0]), -100)


@dataclass(frozen=True)
class Case:
    make: Callable[[str], tuple[nn.Module, list[str]]]
    epochs: int = 6
    samples: int = 1437
    batch: int = 64
    rate: float = 1e-3
    behind: float = 0.12
    narrow: bool = True
    decay: float = 1.0
    """To what the learning rate falls over the epochs."""

    def falling(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay ** (1 / self.epochs))

    def accuracy(self, method: str) -> float:
        """Train a network and return its accuracy; `pytest.skip` where the method is undefined on it."""
        torch.manual_seed(0)
        torch.set_num_threads(1)
        if self.make is tokens:
            x, y = recall()
            training, test = (x[:800], y[:800]), (x[800:], y[800:])
        else:
            data = digits()
            training, test = (
                (data.train_x[: self.samples], data.train_y[: self.samples]),
                (data.validation_x, data.validation_y),
            )
        model, splits = self.make(method)
        try:
            program = locc.compile(
                model,
                method,
                splits,
                example_inputs=training[0][:8],
                seed=0,
                optimizer=locc.Recipe().at(self.rate),
                scheduler=None if self.decay == 1 else self.falling,
                verify=False,
                **NARROW.get(method, {}) if self.narrow else {},
                **TOKENS.get(method, {}) if self.make is tokens else {},
            )
        except locc.MethodError as error:
            pytest.skip(f"undefined: {error}")
        whole = method in PLAIN
        batch, epochs = (len(training[0]), SWEEPS) if whole else (self.batch, self.epochs)
        program.fit(Batches(*training, batch, torch.Generator().manual_seed(0)), epochs, progress=False)
        found = program.evaluate([test]).accuracy
        assert found is not None
        return found


SMALL = {
    "small-mlp": Case(lambda method: mlp(method, 32, 2), epochs=5, samples=500, batch=50, rate=1e-2),
    "small-conv": Case(small_conv, epochs=5, samples=500, batch=50, rate=1e-2),
}
CASES = SMALL | {
    "mlp": Case(mlp, behind=0.08, narrow=False),
    "conv": Case(conv, behind=0.08, narrow=False),
    # Without the decay BatchNorm's statistics lag behind the weights, and the last epoch is a matter of luck.
    "residual": Case(residual, epochs=12, rate=5e-3, decay=0.1, behind=0.18),
    "transformer": Case(transformer, epochs=6, rate=3e-3),
    "tokens": Case(tokens, epochs=16, rate=3e-3),
}


@cache
def backpropagation(name: str) -> float:
    return CASES[name].accuracy("bp")


@pytest.mark.parametrize("method", every_method(but=("bp",)))
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in CASES]
)
def test_it_comes_near_backpropagation(name: str, method: str) -> None:
    allowed = FURTHER.get((name, method), BEHIND.get(method, CASES[name].behind))
    case = CASES[name]
    case = replace(case, epochs=case.epochs * LONGER.get((name, method), 1))
    assert case.accuracy(method) > backpropagation(name) - allowed
