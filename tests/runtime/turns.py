"""Small methods with phases, state and auxiliaries, for tests of what fit goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc import Program
from locc.ir import TensorSpec, TrainingGraph
from locc.ir.view import Phase
from locc.rewrite import Method, Pass
from support import batch, compiled


def norms() -> nn.Sequential:
    """Two modules with BatchNorm and dropout, `a` and `b`, and a last one."""
    net = nn.Sequential()
    net.add_module("a", nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4)))
    net.add_module("b", nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4)))
    net.add_module("c", nn.Linear(6, 3))
    return net


def network(depth: int = 2) -> nn.Sequential:
    """Modules `0`, `1`, .. with BatchNorm and dropout, and a last one; the same weights in every call."""
    torch.manual_seed(0)
    widths = (4, *[6] * (depth - 1))
    blocks = [nn.Sequential(nn.Linear(n, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Dropout(0.2)) for n in widths]
    return nn.Sequential(*blocks, nn.Linear(6, 3))


def every_other(model: nn.Sequential, method: str, **options: Any) -> Program:
    """A program of a `network` that updates every other step, by Adam at a rate that falls."""
    splits = [str(i) for i in range(len(model) - 1)]
    return compiled(
        model, method, splits, example_inputs=batch(4)[0], accumulate=2,
        optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), **options,
    )  # fmt: skip


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """One batch after the other."""
    x, y = batch(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def head(ir: TrainingGraph, owner: str) -> fx.Node:
    """Train a module by a linear head of its own; returns its output."""
    (value,) = ir.outputs(owner)
    spec = value.meta["spec"]
    path = ir.add_module(f"{owner}_head", nn.Linear(spec.features[0], 3).to(spec.dtype))
    logits = ir.call(owner, path, value, role="head")
    ir.objective(owner, ir.emit(owner, functional.cross_entropy, logits, ir.target), "ce")
    return value


@dataclass(frozen=True)
class Heads(Pass):
    """A head for each module but the last; the phases are given."""

    phases: tuple[Phase, ...] = ()

    def rewrite(self, ir: TrainingGraph) -> None:
        for module in ir.modules[:-1]:
            head(ir, module.name)
        ir.objective(ir.last.name, ir.apply_loss(), "loss")
        ir.phases = self.phases


@dataclass(frozen=True)
class InPhases(Method):
    family: ClassVar[str] = "test"
    reference: ClassVar[str] = "none"
    phases: tuple[Phase, ...] = ()

    def passes(self) -> Sequence[Pass]:
        return (Heads(self.phases),)


def changed(now: Tensor, before: Tensor) -> Tensor:
    """How far an activation has moved from that of the step before."""
    return (now - before).square().mean()


def mixed(trace: Tensor, now: Tensor) -> Tensor:
    return 0.9 * trace + 0.1 * now.mean(0)


@dataclass(frozen=True)
class Probes(Pass):
    """Heads; a probe with BatchNorm and dropout that predicts a module's trace from its output of before.

    The probes warm up, and then they and the modules take turns.
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        probes = []
        for module in ir.modules[:-1]:
            name, value = module.name, head(ir, module.name)
            (width,) = value.meta["spec"].features
            trace = ir.state(name, f"{name}_trace", TensorSpec((width,), value.meta["spec"].dtype), 0.5)
            now = ir.stop_gradient(name, value, role="detached")
            ir.assign(name, trace, ir.emit(name, mixed, trace, now))
            probe = ir.add_owner(f"{name}.probe", module).name
            probes.append(probe)
            net = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.3))
            net.to(value.meta["spec"].dtype)
            late = ir.delay(ir.stop_gradient(probe, value))
            guess = ir.call(probe, ir.add_module(f"{name}_probe", net), late, role="probe")
            error = ir.emit(probe, changed, guess, ir.stop_gradient(probe, trace))
            ir.objective(probe, error, "error")
        ir.objective(ir.last.name, ir.apply_loss(), "loss")
        modules = tuple(m.name for m in ir.modules)
        ir.phases = (
            Phase("warm", tuple(probes), epochs=2, warmup=True),
            Phase("probes", tuple(probes)),
            Phase("modules", modules),
        )


@dataclass(frozen=True)
class Probing(Method):
    family: ClassVar[str] = "test"
    reference: ClassVar[str] = "none"

    def passes(self) -> Sequence[Pass]:
        return (Probes(),)
