"""The clean programs: every registered method on every shape that admits it, and copies to spoil."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

import locc
from locc import Program
from locc.ir import TrainingGraph
from verify import shapes
from zoo import find


@dataclass(frozen=True)
class Shape:
    """A model, its splits, its loss and a batch."""

    build: Callable[[], nn.Module]
    splits: tuple[str, ...]
    x: Callable[[], Any]
    y: Callable[[], Any]
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy"


def plain() -> nn.Module:
    """Convolutions whose blocks are open, without an in-place operation."""
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
    return nn.Sequential(first, second, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


def _of_zoo(name: str, cut: int) -> Shape:
    case = find(name)
    return Shape(case.build, case.splits[cut], case.inputs, lambda: case.target(4), case.loss)


SHAPES: dict[str, Shape] = {
    **{name: Shape(s.build, s.splits, s.x, s.y) for name, s in shapes.SHAPES.items()},
    "plain": Shape(plain, ("0", "1"), lambda: torch.randn(4, 1, 4, 4), lambda: torch.arange(4) % 3),
    "two inputs": _of_zoo("two_inputs", 1),
    "custom function": _of_zoo("custom_function", 1),
    "buffers": _of_zoo("running_mean", 0),
}


@dataclass(frozen=True)
class Subject:
    """A clean program, compiled without a proof, with the batch that it runs on."""

    method: str
    shape: str
    program: Program
    x: Any
    y: Any


@cache
def subject(method: str, shape: str) -> Subject | None:
    """Compile a method on a shape; None where the method refuses the model."""
    case = SHAPES[shape]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, y = case.x(), case.y()
        # Networks as wide as a paper's only cost time here.
        options: dict[str, Any] = {"width": 8} if "width" in locc.methods()[method].options else {}
        try:
            program = locc.compile(
                case.build(),
                method,
                list(case.splits),
                loss=case.loss,
                example_inputs=x,
                verify=False,
                seed=0,
                **options,
            )
        except locc.MethodError as refusal:
            if "undefined on this model" not in str(refusal):
                raise
            return None
    return Subject(method, shape, program, x, y)


def pairs() -> Iterator[tuple[str, str]]:
    """Yield every (method, shape); whether the method admits the shape shows when it is compiled."""
    for method in sorted(locc.methods()):
        for shape in SHAPES:
            yield method, shape


def copied(ir: TrainingGraph) -> TrainingGraph:
    """Return a copy of a training graph with a model of its own; the nodes keep their names."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    end = graph.graph_copy(ir.graph, copies)
    old = next(iter(reversed(ir.graph.nodes)))
    copies[old] = graph.output(end)
    for node, made in copies.items():
        made.meta = {key: fx.map_arg(value, copies.__getitem__) for key, value in node.meta.items()}
    assert all(node.name == made.name for node, made in copies.items())
    return replace(
        ir,
        root=copy.deepcopy(ir.root),
        graph=graph,
        owners=dict(ir.owners),
        inputs=tuple(copies[n] for n in ir.inputs),
        target=copies[ir.target],
        output=copies[ir.output],
        prediction=copies[ir.prediction],
        loss=None if ir.loss is None else copies[ir.loss],
        repeats={
            name: replace(region, carried=tuple((copies[a], copies[b]) for a, b in region.carried))
            for name, region in ir.repeats.items()
        },
        couplings=list(ir.couplings),
    )
