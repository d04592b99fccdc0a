"""Keeps the user's model bit-identical while capture runs it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")


def random_state() -> list[Any]:
    """Return the state of torch's random number generators."""
    states: list[Any] = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def same_state(one: list[Any], other: list[Any]) -> bool:
    """Whether two results of `random_state` are equal."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def python_random_state() -> tuple[Any, ...]:
    """Return the state of Python's and NumPy's generators, in a comparable form."""
    state: tuple[Any, ...] = (random.getstate(),)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state = (*state, name, keys.tobytes(), *rest)
    return state


def seed_all(seed: int = 20240229) -> None:
    """Seed every generator that a model's forward may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


@contextmanager
def preserved(root: nn.Module) -> Iterator[None]:
    """Undo, on exit, every change to parameters, buffers, gradients, modes, attributes and generators."""
    undo = [_generators(), *_values(root), *(_attributes(module) for module in root.modules())]
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


@contextmanager
def values_preserved(root: nn.Module) -> Iterator[None]:
    """Undo, on exit, every change to the values of parameters and buffers, and nothing else."""
    tables = [(module._buffers, dict(module._buffers)) for module in root.modules()]
    undo = list(_values(root))
    try:
        yield
    finally:
        for step in undo:
            step()
        for table, saved in tables:
            table.update(saved)


def rewritten(root: nn.Module, before: dict[int, dict[str, Any]]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield (module, attribute, old value) for each attribute or buffer bound anew since `before`."""
    missing = object()
    for module in root.modules():
        old = before.get(id(module), {})
        new = bindings_of(module)
        for name in {**old, **new}:
            if old.get(name, missing) is not new.get(name, missing):
                yield module, name, old.get(name)


def bindings(root: nn.Module) -> dict[int, dict[str, Any]]:
    """Return what every attribute, parameter and buffer of every module is bound to."""
    return {id(module): bindings_of(module) for module in root.modules()}


def bindings_of(module: nn.Module) -> dict[str, Any]:
    """Return what the attributes, parameters and buffers of one module are bound to."""
    plain = {k: v for k, v in module.__dict__.items() if k not in _TABLES}
    return {**plain, **module._parameters, **module._buffers}


def _generators() -> Callable[[], None]:
    torch_states, python = random_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        torch.set_rng_state(torch_states[0])
        if len(torch_states) > 1:
            torch.cuda.set_rng_state_all(torch_states[1:])
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return restore


def _values(root: nn.Module) -> Iterator[Callable[[], None]]:
    tensors = {id(t): t for t in (*root.parameters(), *root.buffers())}
    for tensor in tensors.values():
        yield _value(tensor)


def _value(tensor: torch.Tensor) -> Callable[[], None]:
    saved, grad, requires_grad = tensor.detach().clone(), tensor.grad, tensor.requires_grad

    def restore() -> None:
        with torch.no_grad():
            if not torch.equal(tensor, saved):
                tensor.copy_(saved)
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad

    return restore


def _attributes(module: nn.Module) -> Callable[[], None]:
    attributes = dict(module.__dict__)
    tables = {name: dict(attributes[name]) for name in _TABLES}
    containers = [
        (value, type(value)(value)) for key, value in attributes.items()
        if type(value) in (list, dict, set) and key not in _TABLES
    ]  # fmt: skip

    def restore() -> None:
        for name in set(module.__dict__) - set(attributes):
            del module.__dict__[name]
        module.__dict__.update(attributes)
        for name, table in tables.items():
            current = module.__dict__[name]
            if [(k, id(v)) for k, v in current.items()] != [(k, id(v)) for k, v in table.items()]:
                current.clear()
                current.update(table)
        for container, saved in containers:
            _refill(container, saved)

    return restore


def _refill(container: Any, saved: Any) -> None:
    if isinstance(container, list):
        container[:] = saved
    else:
        container.clear()
        container.update(saved)
