"""Blocks: the weights and auxiliary variables of a network, each set in turn by a formula of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from locc.ir import TensorSpec, TrainingGraph
from locc.rewrite import CLASS_IDS, NUMBERS, Method, Recipe, give_copy, in_place, spec_of
from locc_passes.auxiliary_variables.formulas import OUTPUTS, labels, output_step
from locc_passes.auxiliary_variables.layers import LAYERS, Layer, layers_of, unfit


@dataclass(frozen=True)
class BlockMethod(Method):
    """A method whose weights and auxiliary variables are set by formulas, and have no gradients.

    `optimizer=` and the schedules of rates do nothing, and `accumulate`, `clip` and `scheduler` are refused.
    There are no phases. The user's loss is reported and trains nothing; `output` is what does.
    """

    family: ClassVar[str] = "auxiliary variables"
    recipe: ClassVar[Recipe] = Recipe(source="not used: what trains is set by formulas")
    target: ClassVar[tuple[str, ...]] = (CLASS_IDS, NUMBERS)
    opens: ClassVar[tuple[type[nn.Module], ...]] = LAYERS

    def misfits(self, model: nn.Module) -> Iterator[str]:
        """Refuse a model with a parameter that trains outside of such layers."""
        yield from unfit(model)


@dataclass(frozen=True)
class Formula:
    """A function with its first arguments given, which a node of the graph can call."""

    function: Callable[..., Any]
    given: tuple[object, ...]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any) -> Any:
        """Call the function with the other arguments."""
        return self.function(*self.given, *args)


def unchanged(before: Tensor, x: Tensor) -> Tensor:
    """Return whether this batch is that of the step before, a bool []."""
    return (before == x).all()


def kept(same: Tensor, before: Tensor, start: Tensor | float) -> Tensor:
    """Return an auxiliary variable as the step before left it, or its start on another batch."""
    # A number in torch.where would be rounded to float32.
    start = start if isinstance(start, Tensor) else torch.full_like(before, start)
    return torch.where(same, before, start)


@dataclass
class Blocks:
    """The blocks of a network as they are at one point of a sweep, and how to set one.

    With N layers, layer i computes U_i = W_i V_(i-1) + b_i and V_i = sigma_i(U_i), V_0 the data; `pre` and
    `post` are the letters that a method has for U and V. Each variable is a value of one module: W_i, b_i,
    U_i and V_(i-1) of the module of layer i, V_N of the last layer's. `set` and `run` bring in those of
    others.
    """

    ir: TrainingGraph
    pre: str = "U"
    post: str = "V"
    layers: list[Layer] = field(default_factory=list)
    values: dict[str, fx.Node] = field(default_factory=dict)
    states: dict[str, fx.Node] = field(default_factory=dict)
    same: fx.Node | None = None

    def __post_init__(self) -> None:
        self.layers = layers_of(self.ir)
        for i, layer in enumerate(self.layers, start=1):
            for user in [u for u in layer.pre.users if in_place(self.ir, u)]:
                give_copy(self.ir, user, layer.pre)
            for letter, name in (("W", "weight"), ("b", "bias")):
                if layer.parameter(self.ir, name) is not None:
                    self.values[f"{letter}{i}"] = self.ir.read(layer.owner, f"{layer.path}.{name}")
        self.values[self.input(1)] = self._brought(self.layers[0].owner, self.layers[0].read)

    def input(self, i: int) -> str:
        """Return the name of what layer i reads."""
        return f"{self.post}{i - 1}"

    @property
    def last(self) -> int:
        """The number of layers N."""
        return len(self.layers)

    def layer(self, i: int) -> Layer:
        """Return layer i, counted from 1."""
        return self.layers[i - 1]

    def home(self, name: str) -> str:
        """Return the module to which a variable belongs."""
        i = int(name[1:])
        above = name[0] == self.post and i < self.last
        return self.layer(i + 1 if above else i).owner

    def __getitem__(self, name: str) -> fx.Node | None:
        """Return the value of a variable; None for the bias of a layer that has none."""
        return self.values.get(name)

    def run(
        self, owner: str, function: Callable[..., Any], *args: Any, name: str, spec: Any = None
    ) -> fx.Node:
        """Add a call to a module's program, on variables by name, values of any module and numbers."""
        found = [self.values.get(a) if isinstance(a, str) else a for a in args]
        brought = [self._brought(owner, a) if isinstance(a, fx.Node) else a for a in found]
        return self.ir.emit(owner, function, *brought, role=name, spec=spec)

    def set(self, name: str, function: Callable[..., Any], *args: Any, spec: Any = None) -> None:
        """Set a variable by a formula of others; a parameter that the user has frozen stays."""
        if name[0] in "Wb":
            kind = "weight" if name[0] == "W" else "bias"
            held = self.layer(int(name[1:])).parameter(self.ir, kind)
            if held is None or not held.requires_grad:
                return
        spec = spec_of(self.values[name]) if spec is None and name in self.values else spec
        self.values[name] = self.run(self.home(name), function, *args, name=name, spec=spec)

    def begin(self, name: str, start: fx.Node | float, spec: TensorSpec | None = None) -> None:
        """Start a variable: what the step before left where the batch is the same, else `start`."""
        owner = self.home(name)
        spec = spec_of(start) if isinstance(start, fx.Node) else spec
        assert spec is not None
        if self.same is None:
            first, data = self.layers[0].owner, self.values[self.input(1)]
            before = self.ir.state(first, "batch", spec_of(data), float("inf"))
            self.same = self.ir.emit(first, unchanged, before, data, role="same_batch")
            self.ir.assign(first, before, data)
        self.states[name] = self.ir.state(owner, name, spec)
        self.values[name] = self.run(owner, kept, self.same, self.states[name], start, name=f"{name}_start")

    @property
    def class_dim(self) -> int:
        """The dimension of the output in which the classes are."""
        return -1 if self.layer(self.last).product.window is None else 1

    @cached_property
    def labels(self) -> fx.Node:
        """The target in the shape of the output."""
        layer, read = self.layer(self.last), Formula(labels, (self.class_dim,))
        return self.run(layer.owner, read, self.ir.target, layer.pre, name="labels", spec=spec_of(layer.pre))

    def set_output(self, name: str, kind: str, center: fx.Node, weight: float | str) -> None:
        """Set what stands for the output to the minimum of its loss and of weight / 2 ||. - center||^2."""
        step = Formula(output_step, (kind, self.class_dim))
        self.set(name, step, name, center, weight, self.labels)

    def finish(self) -> None:
        """Commit every variable when the step is over."""
        for name, value in self.values.items():
            if name in self.states:
                self.ir.assign(self.home(name), self.states[name], value)
            elif name[0] in "Wb" and value.op != "get_attr":
                layer = self.layer(int(name[1:]))
                self.ir.assign(layer.owner, f"{layer.path}.{'weight' if name[0] == 'W' else 'bias'}", value)

    def _brought(self, owner: str, node: fx.Node) -> fx.Node:
        return node if node.meta["owner"] == owner else self.ir.stop_gradient(owner, node)


def check(method: Method, positive: tuple[str, ...], counts: tuple[str, ...]) -> None:
    """Refuse options that no formula can use.

    Raises:
        ValueError: names the option.
    """
    for name in positive:
        if not getattr(method, name) > 0:
            raise ValueError(f"{name}={getattr(method, name)}: it weighs a square, so it must be above 0")
    for name in counts:
        if getattr(method, name) < 1:
            raise ValueError(f"{name}={getattr(method, name)}: at least one is needed")
    output = getattr(method, "output", OUTPUTS[0])
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r}: give one of {', '.join(OUTPUTS)}")
