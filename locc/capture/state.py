"""What a forward draws from, and which attributes it binds anew."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from locc.snapshot import preserved, restorer, structure, values_preserved

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


def torch_random_state() -> list[bytes]:
    """Return the states of PyTorch's generators, in a comparable form."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.numpy().tobytes() for state in states]


def seed_all(seed: int = 20240229) -> None:
    """Seed every generator that a model's forward may draw from."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():  # torch.manual_seed formats a stack for each device that is not there
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def settle(root: nn.Module, run: Callable[[], None]) -> None:
    """Let a model set up what it sets up at its first call and at no later one: hooks, tables, layers.

    A model that goes on so at every call, or binds anew what it made, is left as it was.
    """
    undo, before = restorer(root), {id(module): set(vars(module)) for module in root.modules()}
    with values_preserved(root):
        run()
    modules, found = list(root.modules()), structure(root)
    made = [(m, k, v) for m in modules for k, v in vars(m).items() if k not in before.get(id(m), ())]
    with preserved(root):
        run()
        settled = structure(root) == found and all(vars(m).get(k) is v for m, k, v in made)
    if not settled:
        undo()


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
