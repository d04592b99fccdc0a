"""Methods that a third party could write, whose graphs leak, and leaks in parameters and optimizers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

import locc
from locc.ir import TrainingGraph
from locc.rewrite import Method, Pass

from .leaks import Act, Chain, Planted, plain


class Tap(nn.Module):
    """An auxiliary network of `a` that passes its value on and keeps it, live."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.modules_ = (module,)
        self.last: Tensor | None = None
        self.register_buffer("shared", torch.zeros(4))

    @property
    def linear(self) -> Any:
        return self.modules_[0].linear

    def forward(self, h: Tensor) -> Tensor:
        self.last = h
        return h


def run(module: Any, x: Tensor) -> Tensor:
    """Run a planted network from the function of a node."""
    return module.act(module, x) if module.active else plain(module, x)


@dataclass(frozen=True)
class Heads(Pass):
    """A linear head and an objective for each module; that of `b` adds what a planted network computes.

    `place` says how the graph runs it: as a "network" of its own node, or from the "function" of a node.
    """

    act: Act
    own: bool = False
    place: str = "network"

    def rewrite(self, ir: TrainingGraph) -> None:
        ir.add_module("a.tap", Tap(ir.root.model.a))
        for module in ir.modules[:-1]:
            (value,) = ir.outputs(module.name)
            spec = value.meta["spec"]
            if module.name == "a":
                value = ir.call("a", "aux.a_tap", value, role="head", spec=spec)
            elif module.name == "b":
                extra = self._planted(ir, ir.boundaries(consumer="b")[0].entry)
                value = ir.emit("b", operator.add, value, extra, role="head", spec=spec)
            path = ir.add_module(f"{module.name}.head", nn.Linear(4, 3))
            scores = ir.call(module.name, path, value, role="head", spec=ir.prediction.meta["spec"])
            loss = ir.emit(module.name, ir.loss_function, scores, ir.target, role="head")
            ir.objective(module.name, loss, "loss")
        ir.objective(ir.last.name, ir.apply_loss(), "loss")

    def _planted(self, ir: TrainingGraph, x: fx.Node) -> fx.Node:
        network = Planted(self.act, None if self.own else ir.root.aux["a_tap"])
        path = ir.add_module("b.extra", network)
        if self.place == "network":
            return ir.call("b", path, x, role="head", spec=x.meta["spec"])
        held = ir.read("b", path, role="module")
        return ir.emit("b", run, held, x, role="head", spec=x.meta["spec"])


@dataclass(frozen=True)
class ThirdParty(Method):
    """Greedy learning with whatever `act` does in the head of `b`."""

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "none"

    act: Act
    own: bool = False
    place: str = "network"

    def passes(self) -> Sequence[Pass]:
        return (Heads(self.act, self.own, self.place),)


# ---- parameters and optimizers: planted by what a model, a pass or an optimizer holds --------


def _compile(model: nn.Module, method: str | Method, **options: Any) -> locc.Program:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    return locc.compile(model, method, ["a", "b", "c"], example_inputs=x, **options)


def _model() -> Chain:
    torch.manual_seed(0)
    return Chain(plain)


def tied_in_model(leak: bool) -> locc.Program:
    model = _model()
    model.b.second = nn.Linear(4, 4)
    model.b.act = lambda m, x: m.second(plain(m, x))
    model.b.second.weight = (model.a if leak else model.b).linear.weight
    return _compile(model, "dgl", tied="error")


def view_in_model(leak: bool) -> locc.Program:
    model = _model()
    foreign = model.a.linear.weight.detach()
    model.b.linear.weight = nn.Parameter(foreign.t() if leak else foreign.t().clone())
    return _compile(model, "dgl")


def interleaved_in_model(leak: bool) -> locc.Program:
    """Two modules whose weights lie in one storage; only where they overlap do they share anything."""
    model, flat = _model(), torch.randn(33)
    model.a.linear.weight = nn.Parameter(flat[0:32:2].view(4, 4))
    model.b.linear.weight = nn.Parameter(flat[2:18].view(4, 4) if leak else flat[1:33:2].view(4, 4))
    return _compile(model, "dgl")


@dataclass(frozen=True)
class Edge(Pass):
    """The objective of `b` reads what `a` computes; live, if it leaks."""

    leak: bool

    def rewrite(self, ir: TrainingGraph) -> None:
        (foreign,), (own,) = ir.outputs("a"), ir.outputs("b")
        read = foreign if self.leak else ir.stop_gradient("b", foreign)
        spec = own.meta["spec"]
        total = ir.emit("b", operator.add, own, read, role="mix", name="mixed", spec=spec)
        ir.objective("b", ir.emit("b", torch.sum, total, role="mix"), "mix")


@dataclass(frozen=True)
class SharedHead(Pass):
    """A network that two owners run, or that its one owner runs twice."""

    leak: bool

    def rewrite(self, ir: TrainingGraph) -> None:
        path = ir.add_module("shared", nn.Linear(4, 3))
        for number, owner in enumerate(("a", "b") if self.leak else ("a", "a")):
            (value,) = ir.outputs(owner)
            scores = ir.call(owner, path, value, role="head")
            loss = ir.emit(owner, ir.loss_function, scores, ir.target, role="head")
            ir.objective(owner, loss, f"extra_{number}")


@dataclass(frozen=True)
class Borrows(Pass):
    """A head of `b` that holds the layer of `a`, as its own parameters, and does not even call it."""

    leak: bool

    def rewrite(self, ir: TrainingGraph) -> None:
        (value,) = ir.outputs("b")
        head = nn.Linear(4, 3)
        head.add_module("layer", (ir.root.model.a if self.leak else ir.root.model.b).linear)
        scores = ir.call("b", ir.add_module("borrows", head), value, role="head")
        ir.objective("b", ir.emit("b", ir.loss_function, scores, ir.target, role="head"), "extra")


@dataclass(frozen=True)
class HeadOnView(Pass):
    """A head of `b` whose weight is a view of that of `a`."""

    leak: bool

    def rewrite(self, ir: TrainingGraph) -> None:
        (value,) = ir.outputs("b")
        head, foreign = nn.Linear(4, 4), ir.root.model.a.linear.weight.detach()
        head.weight = nn.Parameter(foreign[:] if self.leak else foreign.clone())
        scores = ir.call("b", ir.add_module("view", head), value, role="head", spec=value.meta["spec"])
        ir.objective("b", ir.emit("b", torch.sum, scores, role="head"), "extra")


@dataclass(frozen=True)
class Greedy(Method):
    """`dgl`, then one more pass."""

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "none"

    more: Pass

    def passes(self) -> Sequence[Pass]:
        return (*locc.method("dgl").passes(), self.more)


class Decaying(torch.optim.SGD):
    """Decays one more parameter than it was given."""

    extra: Tensor

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            self.extra.mul_(0.9)


def _decaying(own: list[Tensor], foreign: Tensor, leak: bool) -> torch.optim.Optimizer:
    made = Decaying(own, lr=0.1)
    made.extra = foreign if leak else own[0]
    return made


def _twice(own: list[Tensor], foreign: Tensor, leak: bool) -> torch.optim.Optimizer:
    more = [{"params": [foreign], "weight_decay": 0.1}] if leak else []
    return torch.optim.SGD([{"params": own[:1]}, {"params": own[1:]}, *more], lr=0.1)


def _overlapping(own: list[Tensor], foreign: Tensor, leak: bool) -> torch.optim.Optimizer:
    more = [nn.Parameter(foreign.detach()[1:])] if leak else []
    return torch.optim.SGD([*own, *more], lr=0.1)


def with_optimizer(
    make: Callable[[list[Tensor], Tensor, bool], torch.optim.Optimizer], auxiliary: bool
) -> Callable[[bool], locc.Program]:
    """Plant an optimizer: that of `b` has a parameter of `a`, of the model or of its auxiliary head."""

    def compile(leak: bool) -> locc.Program:
        calls: list[list[Tensor]] = []

        def factory(params: Any) -> torch.optim.Optimizer:
            calls.append(list(params))
            foreign = calls[0][-2 if auxiliary else 0]
            return make(calls[-1], foreign, leak and len(calls) == 2)

        return _compile(_model(), "dgl", optimizer=factory)

    return compile


def with_pass(kind: Callable[[bool], Pass]) -> Callable[[bool], locc.Program]:
    """Plant a pass after those of `dgl`."""
    return lambda leak: _compile(_model(), Greedy(kind(leak)))


@dataclass(frozen=True)
class Plant:
    """Something that `compile` refuses with `error` where it leaks, and accepts where it does not."""

    place: str
    compile: Callable[[bool], locc.Program]
    error: type[locc.LoccError]
    text: str


_MORE = "optimizer(params) for 'b' does not hold exactly the parameters it was given"
_TWO = "parameter '{}' has two owners, 'a' and 'b'"
_SHARES = "of 'b' shares memory with parameter 'a.linear.weight' of 'a'"
_MOVES = "the optimizer step of 'b' changes parameter '{}', which module 'a' owns"
PLANTS = {
    "a tied weight": Plant("model", tied_in_model, locc.SplitError, "'a.linear.weight' in module 'a', 'b.se"),
    "a parameter on a view": Plant("model", view_in_model, locc.LocalityError, _SHARES),
    "parameters that interleave": Plant("model", interleaved_in_model, locc.LocalityError, _SHARES),
    "an optimizer with one parameter more": Plant(
        "model", with_optimizer(_twice, False), locc.MethodError, _MORE
    ),
    "an optimizer over memory of another": Plant(
        "model", with_optimizer(_overlapping, False), locc.MethodError, _MORE
    ),
    "an optimizer that decays": Plant(
        "model", with_optimizer(_decaying, False), locc.LocalityError, _MOVES.format("a.linear.weight")
    ),
    "an edge without stop_gradient": Plant(
        "graph", with_pass(Edge), locc.GraphError, "'mixed' of 'b' reads 'a' of 'a' without stop_gradient"
    ),
    "a network of two owners": Plant(
        "graph", with_pass(SharedHead), locc.GraphError, _TWO.format("aux.shared.weight")
    ),
    "a network that holds a foreign layer": Plant(
        "graph", with_pass(Borrows), locc.GraphError, _TWO.format("a.linear.weight")
    ),
    "a network on a view": Plant("graph", with_pass(HeadOnView), locc.LocalityError, _SHARES),
    "an optimizer with a head more": Plant("graph", with_optimizer(_twice, True), locc.MethodError, _MORE),
    "an optimizer over memory of a head": Plant(
        "graph", with_optimizer(_overlapping, True), locc.MethodError, _MORE
    ),
    "an optimizer that decays a head": Plant(
        "graph",
        with_optimizer(_decaying, True),
        locc.LocalityError,
        _MOVES.format("aux.a_head_a.linear.weight"),
    ),
}


def bare_program(method: str = "dgl") -> locc.Program:
    """Return an unverified program of four plain modules, for a graph or an optimizer to be spoilt."""
    torch.manual_seed(0)
    names = ["a", "b", "c", "head"]
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)] + [nn.Linear(4, 3)]
    model = nn.Sequential()
    for name, layer in zip(names, layers, strict=True):
        model.add_module(name, layer)
    return locc.compile(model, method, ["a", "b", "c"], example_inputs=torch.randn(4, 4), verify=False)
