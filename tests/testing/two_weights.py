"""Two weights, out = w2 * w1 * x, as a model whose steps can be worked out by hand.

With x = [1, 3], y = [0, 1], w1 = 2 and w2 = -1: h = [2, 6], out = [-2, -6], the loss is (4 + 49) / 2 = 26.5,
and its gradients are [-2, -7] for out, [2, 7] for h, -2 * 2 - 7 * 6 = -46 for w2, 2 * 1 + 7 * 3 = 23 for w1.
The learning rate is 0.1.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import locc
from locc import Program
from locc.ir import Repeat, TensorSpec, TrainingGraph, carry, inner
from rules import Rule, repeat

X = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
Y = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
NUMBER = TensorSpec((), torch.float64)
Rewrite = Callable[[TrainingGraph], None]


def weight(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def model(*between: tuple[str, nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict([("one", weight(2.0)), *between, ("two", weight(-1.0))])).double()


def program(act: Rewrite | str, net: nn.Module | None = None, **options: Any) -> Program:
    method = act if isinstance(act, str) else Rule(act)
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "loss": "mse", "seed": 3} | options
    net = model() if net is None else net
    return locc.compile(net, method, ["one"], example_inputs=X.to(next(net.parameters()).dtype), **options)


def weights(found: Program) -> list[float]:
    return [float(found.model.get_submodule(name).weight) for name in ("one", "two")]


def hidden(ir: TrainingGraph) -> fx.Node:
    (value,) = ir.outputs("one")
    return value


def chained(ir: TrainingGraph) -> None:
    """Backpropagation, written out: <h, the gradient of the loss with respect to h>."""
    loss = ir.apply_loss()
    ir.objective("two", loss, "loss")
    slope = ir.gradient(loss, ir.boundaries(consumer="two")[0].entry)
    ir.objective("one", ir.emit("one", inner, hidden(ir), ir.stop_gradient("one", slope)), "chain")


def kept(ir: TrainingGraph) -> None:
    """The same, and a state that holds the mean of h."""
    chained(ir)
    ir.assign("one", ir.state("one", "held", NUMBER), ir.emit("one", torch.mean, hidden(ir)))


def delayed(ir: TrainingGraph) -> None:
    """The mean of h times the mean of h two steps ago, and the loss."""
    mean = ir.emit("one", torch.mean, hidden(ir))
    ir.objective("one", ir.emit("one", operator.mul, mean, ir.delay(mean, 2, 5.0)), "product")
    ir.objective("two", ir.apply_loss(), "loss")


def three(ir: TrainingGraph) -> None:
    """Three objectives on one value, whose gradients round by the order in which they are added."""
    for name, factor in (("a", 1.0), ("b", 2.0**-24), ("c", 2.0**-24)):
        scaled = ir.emit("one", operator.mul, hidden(ir), factor, name=name)
        ir.objective("one", ir.emit("one", torch.mean, scaled), name)
    ir.objective("two", ir.apply_loss(), "loss")


def rounds(ir: TrainingGraph) -> None:
    """Four rounds of Fibonacci's numbers, beside gradient steps and a count in a state."""
    owner = "two"
    first = ir.emit(owner, torch.ones_like, ir.apply_loss())
    held = ir.state(owner, "count", NUMBER)
    before = set(ir.graph.nodes)
    a, b, z = (ir.emit(owner, carry, first, name=name) for name in "abz")
    total = ir.emit(owner, operator.add, a, b)
    leaf = ir.stop_gradient(owner, z, role="leaf")
    slope = ir.gradient(ir.emit(owner, torch.square, leaf), leaf)
    moved = ir.emit(owner, lower, z, slope)
    ir.assign(owner, held, ir.emit(owner, operator.add, held, 1))
    repeat(ir, "rounds", before)
    ir.repeats["rounds"] = Repeat("rounds", 4, ((b, total), (a, b), (z, moved)))
    factor = ir.emit(owner, operator.mul, total, moved)
    ir.objective(owner, ir.emit(owner, operator.mul, ir.apply_loss(), factor), "product")
    ir.objective("one", ir.emit("one", torch.mean, hidden(ir)), "mean")


def lower(z: Tensor, slope: Tensor) -> Tensor:
    return z - 0.25 * slope
