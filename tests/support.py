"""Small models and programs that many tests share."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc import Program
from locc.rewrite import Method
from locc.runtime import checkpoint
from locc.runtime.streams import seed_all, stream
from locc.testing import CONFORMANCE_MODELS, Case


class Residual(nn.Module):
    """Blocks with the residual addition in the outer forward, and a skip from the input to the end."""

    def __init__(self, blocks: int = 3, width: int = 6) -> None:
        super().__init__()
        self.inp = nn.Linear(4, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x + first)


class Centred(nn.Module):
    """Trains on what is left of its input [B,6] when a running mean, a buffer, is taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean


class Tied(nn.Module):
    """A language model whose head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.mid = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(tokens))))


class WithRow(nn.Embedding):
    """Returns a view of its weight as well."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(tokens), self.weight[1]


class Lent(Tied):
    """Whose last module reads a view of a parameter of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = WithRow(11, 5), nn.Linear(5, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x, row = self.embed(tokens)
        return self.head(torch.tanh(self.mid(x)) + row)


class Skip(nn.Module):
    """A value of `a` skips `b`."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(inputs, width), nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(torch.tanh(self.b(torch.tanh(h)))) + h


class Pair(nn.Module):
    """Two values cross the cut behind `cell`."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(inputs, 5), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x)
        return self.out(torch.cat([torch.tanh(h), c], 1))


class Ids(nn.Module):
    """What crosses the cut are whole numbers."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.a, self.e, self.out = nn.Linear(inputs, 4), nn.Embedding(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.e(locc.split(self.a(x).argmax(1), "ids")))


def mlp(dropout: float = 0.0) -> nn.Sequential:
    """Three linear layers, with names."""
    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 8))
    model.add_module("relu1", nn.ReLU())
    model.add_module("drop", nn.Dropout(dropout))
    model.add_module("second", nn.Linear(8, 8))
    model.add_module("relu2", nn.ReLU())
    model.add_module("third", nn.Linear(8, 3))
    return model


def batch(size: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A batch for `mlp` and `Residual`."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(size, 4, generator=generator).to(dtype), torch.randint(3, (size,), generator=generator)


def sgd(rate: float = 0.1) -> Callable[[Any], torch.optim.Optimizer]:
    """A factory of plain SGD."""
    return lambda params: torch.optim.SGD(params, lr=rate)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state of a model."""
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def usual_case(method: str | Method) -> Case:
    """A chain with BatchNorm and dropout; where a method refuses these a plain one, or convolutions."""
    cases = [replace(CONFORMANCE_MODELS[name], method=method) for name in ("norm", "mlp", "convolution")]
    return next(case for case in cases if case.refusal() is None)


AKIN = frozenset(
    [
        "al-pipe",
        "dgl-async",
        "sim",
        "pred",
        "fixed-aux",
        "cascade",
        "greedy-seq",
        "kernel-pull",
        "dni",
        "tp",
        "ddtp-linear",
        "ddtp-rhl",
        "ss-usf",
        "ss-brsf",
        "ss-frsf",
        "ifa",
        "admm",
        "bcd2",
    ]
)
"""Methods whose passes another one has too: tests of every method take them in `make slow` alone."""


def every_method(but: Collection[str] = (), slow: Collection[str] = ()) -> list[Any]:
    """Return all ids as parameters of a test, those of `AKIN` and `slow` marked as slow, less some."""
    names = [name for name in sorted(locc.methods()) if name not in but]
    late = AKIN.union(slow)
    return [pytest.param(name, marks=pytest.mark.slow) if name in late else name for name in names]


def close(one: nn.Module, other: nn.Module, tolerance: float = 1e-10) -> None:
    """Fail unless two modules hold the same, up to rounding."""
    wanted = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=tolerance, rtol=0, msg=name)


def everything(program: Program) -> dict[str, Tensor]:
    """Every tensor and number that training depends on."""
    tensors, header = checkpoint._state(program)
    tensors["header"] = torch.tensor(list(json.dumps(header).encode()))
    return tensors


def compiled(model: nn.Module, method: Any = "bp", splits: Any = (), **options: Any) -> Program:
    """Compile for `batch()` unless example inputs are given."""
    options.setdefault("example_inputs", batch(dtype=next(model.parameters()).dtype)[0])
    return locc.compile(model, method, splits, **options)


def gap(model: nn.Module, splits: Any, x: Any = None, y: Any = None, steps: int = 2, **options: Any) -> float:
    """How far `bp` is from `loss.backward()` in float64: the largest difference in the loss and the state."""
    given = batch(dtype=torch.float64)
    x, y = given[0] if x is None else x, given[1] if y is None else y
    model = model.double()
    eager = copy.deepcopy(model)
    program = compiled(model, "bp", splits, optimizer=sgd(), example_inputs=x, **options)
    optimizer = sgd()([p for p in eager.parameters() if p.requires_grad])
    apart = [torch.zeros(())]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(eager(x), y)
        loss.backward()
        optimizer.step()
        apart.append(program.step(x, y).loss - loss.detach())
    states = zip(model.state_dict().values(), eager.state_dict().values(), strict=True)
    return max(float(d.abs().max()) for d in (*apart, *(p - q for p, q in states)))


def drawn(step: int, node: str, share: float, y: Tensor) -> Tensor:
    """Positions of [B,T] by the random stream of a node; those where nobody has a class come last."""
    with torch.random.fork_rng():
        seed_all(stream(0, step, node))
        keys = torch.rand(y.shape[1]) + (y == -100).all(0)
    return keys.argsort()[: round(share * y.shape[1])].sort().values
