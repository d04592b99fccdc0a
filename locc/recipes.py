"""Recipes: the optimizers that a method was published with, as data; `optimizer=None` means its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from locc.errors import LoccError, nearest
from locc.optimizers import BatchManhattan

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "manhattan": BatchManhattan,
}
_FUSED = ("adam", "adamw", "sgd")
_FUSED_ON = ("cpu", "cuda")
_FUSED_FOR = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer of `torch.optim` or `locc.optimizers` by name, its learning rate, and its other arguments.

    Raises:
        LoccError: the name is none of `OPTIMIZERS`, or the rate is not above 0.
    """

    name: str = "adam"
    lr: float = 1e-3
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise LoccError(f"there is no optimizer '{self.name}'; {nearest(self.name, OPTIMIZERS)}")
        if not self.lr > 0:
            raise LoccError(f"learning rate {self.lr!r} of {self.name}: give a number above 0")

    def build(self, parameters: Sequence[nn.Parameter], dense: bool = True) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters, fused where PyTorch has that for all of them.

        A fused one goes through the memory once, and alone skips an update on the device, so that a step on
        CUDA needs no synchronisation. It takes no sparse gradients: `dense` says that there are none.
        """
        given: dict[str, Any] = {"lr": self.lr, **self.arguments}
        kernels = all(p.device.type in _FUSED_ON and p.dtype in _FUSED_FOR for p in parameters)
        if self.name in _FUSED and dense and kernels and not given.keys() & {"foreach", "differentiable"}:
            given.setdefault("fused", True)
        return OPTIMIZERS[self.name](parameters, **given)

    def __str__(self) -> str:
        shown = {"lr": f"{self.lr:g}", **self.arguments}
        return f"{OPTIMIZERS[self.name].__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"


@dataclass(frozen=True)
class Recipe:
    """How a method trains where the user gives no optimizer.

    Attributes:
        modules: the optimizer of each module.
        auxiliaries: the optimizer of auxiliary owners by kind, the last part of their name ("inverse"); those
            of other kinds have that of the modules.
        source: where this comes from.
        network: what the networks had that were published with it, or an empty text.
    """

    modules: OptimizerSpec = field(default_factory=OptimizerSpec)
    auxiliaries: Mapping[str, OptimizerSpec] = field(default_factory=dict)
    source: str = "locc's own: the rate that Kingma & Ba 2015 suggest for Adam"
    network: str = ""

    def of(self, owner: str, auxiliary: bool) -> OptimizerSpec:
        """Return the optimizer of an owner."""
        return self.auxiliaries.get(owner.rpartition(".")[2], self.modules) if auxiliary else self.modules

    def at(self, lr: float) -> Recipe:
        """Return the recipe with another learning rate of the modules; those of auxiliaries keep their ratio.

        Raises:
            LoccError: the rate is not above 0.
        """
        modules, scale = replace(self.modules, lr=lr), lr / self.modules.lr
        others = {kind: replace(spec, lr=spec.lr * scale) for kind, spec in self.auxiliaries.items()}
        source = f"{self.source}; at {scale:g} times its rate" if scale != 1 else self.source
        return replace(self, modules=modules, auxiliaries=others, source=source)

    def __str__(self) -> str:
        others = "".join(f"; each {kind} {spec}" for kind, spec in self.auxiliaries.items())
        return f"{self.modules}{others} ({self.source})"
