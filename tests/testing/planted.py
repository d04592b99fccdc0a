"""Models for the assertions of the kit; every one is local in its gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import locc

WIDTH, CLASSES = 4, 3


def batch(size: int = 6, seed: int = 7) -> tuple[Tensor, Tensor]:
    """A batch for every model here."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, WIDTH, generator=draw), torch.randint(CLASSES, (size,), generator=draw)


class Leaf(nn.Module):
    """A linear layer and tanh, with what a careless author may keep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)
        self.last: Tensor | None = None
        self.calls = 0
        self.register_buffer("constant", torch.full((WIDTH,), 0.5))
        self.register_buffer("order", torch.arange(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.tanh(self.linear(self.drop(x)))
        self.last = h.detach()
        with torch.no_grad():
            self.mean.lerp_(h.mean(0).to(self.mean), 0.1)
        return h


class Reader(Leaf):
    """A leaf that adds `act(other)` to its input; `other` is not registered as a submodule."""

    def __init__(self, act: Callable[[Any], Any], other: nn.Module | None) -> None:
        super().__init__()
        self.act, self.others = act, (other,)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.act(self.others[0] or self))


class Chain(nn.Module):
    """a -> b -> c -> head; b may read something of a, c or itself."""

    def __init__(self, act: Callable[[Any], Any] | None = None, of: str = "a") -> None:
        super().__init__()
        self.a, self.c, self.head = Leaf(), Leaf(), nn.Linear(WIDTH, CLASSES)
        self.b = Leaf() if act is None else Reader(act, getattr(self, of, None))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


class Residual(nn.Module):
    """BatchNorm, dropout, an in-place addition and a skip over two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        layers = [nn.ReLU(inplace=True), nn.Dropout(0.3), nn.BatchNorm1d(WIDTH)]
        self.one = nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers)
        self.two = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        y = self.one(x)
        y += x
        return self.head(self.two(y) + first)


class Sharing(nn.Module):
    """One buffer in two modules: `one` moves it and `two` reads it, or the other way round.

    With `swapped`, they are registered in the opposite order to that in which they run.
    """

    class Part(nn.Module):
        def __init__(self, statistic: Tensor, writes: bool) -> None:
            super().__init__()
            self.linear, self.writes = nn.Linear(WIDTH, WIDTH), writes
            self.register_buffer("statistic", statistic)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.linear(x))
            if not self.writes:
                return h + self.statistic
            with torch.no_grad():
                self.statistic.copy_(h.mean(0))
            return h

    def __init__(self, first: bool, swapped: bool = False) -> None:
        super().__init__()
        statistic = torch.zeros(WIDTH)
        parts = {"one": self.Part(statistic, first), "two": self.Part(statistic, not first)}
        for name in sorted(parts, reverse=swapped):
            self.add_module(name, parts[name])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)))


class Langevin(torch.optim.SGD):
    """Adds noise to what it updates."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=0.01)


class _Noisy(torch.autograd.Function):
    """Adds noise to a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + torch.randn_like(gradient)


class NoisyLeaf(Leaf):
    def forward(self, x: Tensor) -> Tensor:
        return _Noisy.apply(super().forward(x))


SPLITS = ["a", "b", "c"]


def program_of(model: nn.Module, method: str = "dgl", **options: Any) -> locc.Program:
    """Compile one of these models."""
    torch.manual_seed(0)
    options = {"splits": SPLITS, "example_inputs": batch()[0], "seed": 0} | options
    return locc.compile(model, method, **options)


def freeze(value: Any) -> Any:
    """A value that is equal for equal bits."""
    if isinstance(value, Tensor):
        flat = value.detach().clone().contiguous().view(-1)
        return value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: freeze(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [freeze(v) for v in value]
    return value


def everything(program: locc.Program) -> Any:
    """All that a run of a program may change."""
    name, keys, *rest = np.random.get_state()
    tensors = program.root.state_dict(keep_vars=True)
    skip = ("_", "act", "others")
    return freeze(
        {
            "tensors": tensors,
            "identity": {k: id(v) for k, v in tensors.items()},
            "gradients": {k: (id(p.grad), p.grad) for k, p in program.root.named_parameters()},
            "attributes": {
                k: {a: (id(v), v) for a, v in m.__dict__.items() if not a.startswith(skip)}
                for k, m in program.model.named_modules()
            },
            "modes": {k: m.training for k, m in program.named_modules()},
            "optimizers": {k: o.state_dict() for k, o in program.optimizers.items()},
            "learners": {k: (v.pending, id(v.skip)) for k, v in program.built.learners.items()},
            "program": (program.steps, program.epochs, program.phase, id(program.built.executor.observe)),
            "certificate": id(program.built.certificate),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": (name, keys.tobytes(), rest),
        }
    )


def but_for_the_proof(program: locc.Program) -> Any:
    """The same without the certificate, which a proof makes anew."""
    return everything(program) | {"certificate": None}
