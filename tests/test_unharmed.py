"""Compiling harms no model: whatever comes of it, the model is as it was."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import locc
from locc import compiler, request
from locc.snapshot import same_bits


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.b = nn.Linear(4, 3)

    def body(self, x: Tensor) -> Tensor:
        h: Tensor = self.b(self.drop(self.norm(torch.relu(self.a(x)))))
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class HooksItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "done"):
            self.a.register_forward_hook(lambda module, args, out: out * 2)
            self.done = True
        return self.body(x)


class HooksItsWeight(Base):
    ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.a.weight.register_hook(lambda gradient: gradient * 0.5)
            self.ready = True
        return self.body(x)


class MakesATable(Base):
    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self._buffers:
            self.register_buffer("scale", torch.tensor(2.0))
        h: Tensor = self.body(x) * self.scale
        return h


class MakesALayer(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "last"):
            self.last = nn.Linear(3, 3)
        h: Tensor = self.last(self.body(x))
        return h


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


class Memory:
    def __init__(self) -> None:
        self.shapes: list[Any] = []
        self.calls = 0


class WritesAnObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def forward(self, x: Tensor) -> Tensor:
        self.memory.calls += 1
        self.memory.shapes.append(tuple(x.shape))
        return self.body(x)


class HooksAtEveryCall(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.a.register_forward_hook(lambda module, args, out: out * 1.1)
        return self.body(x)


class Draws(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (1 + random.random())


class Ties(Base):
    """With tied="copy", a program that compiles gives one of the two layers a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(4, 4)
        self.c.weight = self.a.weight

    def body(self, x: Tensor) -> Tensor:
        h: Tensor = self.b(self.c(torch.relu(self.a(x))))
        return h


def frozen() -> nn.Module:
    model = Base()
    model.a.requires_grad_(False)
    model.norm.eval()
    return model


def normalised() -> nn.Module:
    model = Base()
    nn.utils.parametrizations.spectral_norm(model.a)
    nn.utils.parametrizations.weight_norm(model.b)
    return model


def mid_training() -> nn.Module:
    model = Base()
    model(torch.randn(4, 4)).sum().backward()
    return model.eval()


SETTLED = [Base, Counts, WritesAnObject, HooksAtEveryCall, Draws, Ties, frozen, normalised, mid_training]
AT_FIRST_CALL = [HooksItself, HooksItsWeight, MakesATable, MakesALayer]
STAGES = ["marker_ancestors", "resolve", "capture", "partition", "apply", "check_target", "stages", "prove"]


X = torch.arange(16.0).view(4, 4) / 16


def _still(value: Any) -> Any:
    if isinstance(value, Tensor):
        hooks = [len(table or ()) for table in (value._backward_hooks, value._post_accumulate_grad_hooks)]
        gradient = _still(value.grad) if value.is_leaf else None
        return (id(value), value.detach().clone(), value.requires_grad, value.is_leaf, gradient, hooks)
    if isinstance(value, Memory):
        return _still(vars(value))
    if isinstance(value, dict):
        return {key: _still(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_still(v) for v in value]
    return value


def looks(model: nn.Module) -> dict[str, Any]:
    """Everything that a model holds, and the generators."""
    modules = {name: _still(dict(vars(module))) for name, module in model.named_modules()}
    return {
        "modules": modules,
        "random": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "input": X.clone(),
        "call": nn.Module.__call__,
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if same_bits(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{where}.{key}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += differences(one[key], other[key], f"{where}.{key}")
        return found
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    return [] if one is other or one == other else [where]


def outputs(model: nn.Module) -> Tensor:
    random.seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return copy.deepcopy(model).eval()(X).detach()  # type: ignore[no-any-return]


class Injected(BaseException):
    """Not an Exception: as Ctrl-C is not."""


@contextmanager
def failing_at_call(number: int) -> Iterator[None]:
    """Raise at the n-th call of any module."""
    calls = itertools.count(1)

    def stop(module: nn.Module, args: Any) -> None:
        if next(calls) == number:
            raise Injected

    handle = register_module_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def failing_stage(stage: str, after: bool) -> Iterator[None]:
    """Raise before a stage of compiling, or after it."""
    module = compiler if hasattr(compiler, stage) else request
    real = getattr(module, stage)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if after:
            real(*args, **kwargs)
        raise Injected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, stage, failing)
        yield


def test_the_comparison_sees_each_kind_of_change() -> None:
    changes: dict[str, Callable[[Base], Any]] = {
        "value": lambda m: m.b.bias.detach().add_(1),
        "attribute": lambda m: setattr(m, "new", 1),
        "mode": lambda m: m.norm.eval(),
        "frozen": lambda m: m.b.bias.requires_grad_(False),
        "gradient": lambda m: setattr(m.b.bias, "grad", torch.ones(3)),
        "hook": lambda m: m.a.register_forward_hook(lambda *_: None),
        "tensor hook": lambda m: m.a.weight.register_hook(lambda g: None),
        "generator": lambda m: torch.rand(1),
        "another generator": lambda m: random.random(),
    }
    for change in changes.values():
        model = Base()
        before = looks(model)
        assert not differences(before, looks(model))
        change(model)
        assert differences(before, looks(model))


@settings(max_examples=2 * settings().max_examples)
@given(
    make=st.sampled_from([*SETTLED, *AT_FIRST_CALL]),
    method=st.sampled_from(["bp", "dgl", "dtp", "dni", "fa", "al", "altmin"]),
    failure=st.one_of(
        st.none(),
        st.builds(failing_at_call, st.integers(1, 400)),
        st.builds(failing_stage, st.sampled_from(STAGES), st.booleans()),
    ),
    tied=st.sampled_from(["error", "copy"]),
    seed=st.integers(0, 3),
)
def test_whatever_comes_of_compiling(
    make: Callable[[], nn.Module], method: str, failure: Any, tied: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model = make()
    computed, before = outputs(model), looks(model)
    try:
        with failure or nullcontext():
            program = locc.compile(model, method, ["a"], example_inputs=X, tied=tied)
    except (locc.LoccError, Injected):
        assert not differences(before, looks(model))
    else:
        if make not in (*AT_FIRST_CALL, Ties):
            assert not differences(before, looks(model))
        assert program.model is model
    if make is not MakesALayer:  # a layer that is made anew at each first call
        assert same_bits(computed, outputs(model))


@pytest.mark.parametrize("make", AT_FIRST_CALL)
def test_what_a_model_sets_up_at_its_first_call_is_captured(make: Callable[[], nn.Module]) -> None:
    """As if it had been called once before: nothing twice, and the program computes what the model does."""
    model = make()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    program = locc.compile(model, "bp", ["a"], example_inputs=X)
    assert all(same_bits(model.state_dict()[name], t) for name, t in kept.items())
    assert sum(len(m._forward_hooks) for m in model.modules()) == (make is HooksItself)
    assert len(program.model.a.weight._backward_hooks or ()) == (make is HooksItsWeight)
    assert same_bits(program.eval()(X), outputs(model))


def test_a_model_that_hooks_itself_at_every_call_is_not_hooked() -> None:
    model = HooksAtEveryCall()
    with suppress(locc.LoccError):
        locc.compile(model, "bp", ["a"], example_inputs=X)
    assert not model.a._forward_hooks
