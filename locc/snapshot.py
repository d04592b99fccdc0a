"""Leaves a model bit for bit as it was: tensors, attributes, hooks, gradients, optimizers, generators."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import is_, is_not
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn, optim

from locc import files

_TABLES = ("_parameters", "_buffers", "_modules")
_HOLDING = (list, dict, set, deque, tuple)
_PLAIN = {bool, int, float, str, type(None)}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def preserved(
    root: nn.Module, optimizers: Iterable[optim.Optimizer] = (), values: bool = True
) -> Iterator[None]:
    """Undo, on exit, whatever a run changes; inside, no parameter has a gradient.

    With `values=False`, what a run on fake tensors cannot change is not copied: parameters, buffers and
    optimizer state, but for its counters.
    """
    restore = restorer(root, optimizers, values)
    for tensor in _tensors(list(root.modules())):
        tensor.grad = None
    try:
        yield
    finally:
        restore()


def restorer(
    root: nn.Module, optimizers: Iterable[optim.Optimizer] = (), values: bool = True
) -> Callable[[], None]:
    """Return what undoes any change that comes after this call; for the arguments see `preserved`."""
    modules = list(root.modules())
    tensors = _tensors(modules)
    undo = [_generators(), *(_tensor(t, values) for t in tensors), _hooks(tensors), _attributes(modules)]
    undo += [_optimizer(o, values) for o in optimizers]

    def restore() -> None:
        for step in reversed(undo):
            step()

    return restore


@contextmanager
def undone_on_failure(root: nn.Module) -> Iterator[None]:
    """Undo whatever the block changed, values of parameters and buffers excepted, where it raises."""
    restore = restorer(root, values=False)
    try:
        yield
    except BaseException:
        restore()
        raise


def structure(root: nn.Module) -> dict[int, set[Any]]:
    """Return what each module has: the names of its attributes, tensors and submodules, and its hooks."""
    return {id(module): _structure(module) for module in root.modules()}


def _structure(module: nn.Module) -> set[Any]:
    held = module.__dict__.items()  # tables of hooks are OrderedDicts
    tables: list[tuple[str, Any]] = [(k, v) for k, v in held if k in _TABLES or isinstance(v, OrderedDict)]
    for name, tensor in module._parameters.items():
        tables += [(name, table) for table in _hooks_of(tensor) if table] if tensor is not None else []
    return {*module.__dict__, *((name, key) for name, table in tables for key in table)}


@contextmanager
def values_preserved(root: nn.Module) -> Iterator[None]:
    """Undo, on exit, every change to the values of parameters and buffers, and nothing else."""
    modules = list(root.modules())
    tables = [(module._buffers, dict(module._buffers)) for module in modules]
    undo = [_tensor(t, True) for t in _tensors(modules)]
    try:
        yield
    finally:
        for step in undo:
            step()
        for table, saved in tables:
            table.update(saved)


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    buffers = [b for module in modules for b in module._buffers.values() if b is not None]
    return list({id(t): t for t in (*parameters, *buffers)}.values())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return torch.equal(bits(one), bits(other))


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, so that NaN equals itself and -0 is not 0."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_BITS[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _generators() -> Callable[[], None]:
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)

    return restore


def _tensor(tensor: Tensor, values: bool) -> Callable[[], None]:
    saved = files.copy(tensor) if values else None
    gradient, requires_grad, taped = (
        tensor.grad if tensor.is_leaf else None,
        tensor.requires_grad,
        tensor.grad_fn,
    )

    def restore() -> None:
        with torch.no_grad():
            if taped is None and tensor.grad_fn is not None:
                tensor.detach_()
            if saved is not None:
                _put_back(tensor, saved)
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = gradient

    return restore


def _hooks(tensors: list[Tensor]) -> Callable[[], None]:
    before = [[dict(table or ()) for table in _hooks_of(t)] for t in tensors]

    def restore() -> None:
        for tensor, saved in zip(tensors, before, strict=True):
            for table, hooks in zip(_hooks_of(tensor), saved, strict=True):
                if table:
                    _refill(table, hooks)

    return restore


def _hooks_of(tensor: Tensor) -> tuple[Any, Any]:
    return tensor._backward_hooks, tensor._post_accumulate_grad_hooks


def _attributes(modules: list[nn.Module]) -> Callable[[], None]:
    tables = [(module.__dict__, module.__dict__.copy()) for module in modules]
    values = [v for _, saved in tables for v in saved.values() if v.__class__ not in _PLAIN]
    held = _containers([v if isinstance(v, _HOLDING) else _fields(v) for v in values])
    tensors = [(v, v.detach().clone()) for v in values if isinstance(v, Tensor)]

    def restore() -> None:
        for table, saved in tables:
            for name in table.keys() - saved.keys():
                del table[name]
            table.update(saved)
        for container, content in held:
            if container or content:
                _refill(container, content)
        for tensor, value in tensors:
            _put_back(tensor, value)

    return restore


def _put_back(tensor: Tensor, saved: Tensor) -> None:
    if tensor.shape != saved.shape:  # an observer of quantisation sizes its buffers at its first call
        tensor.data = saved.clone()
    elif not same_bits(tensor.detach(), saved):
        tensor.detach().copy_(saved)


def _fields(value: Any) -> Any:
    """Return the attributes of a plain object that a module holds: a cache, a configuration."""
    fields = getattr(value, "__dict__", None)
    plain = isinstance(fields, dict) and not isinstance(value, (nn.Module, Tensor, ModuleType))
    return fields if plain else ()


def _containers(found: list[Any]) -> list[tuple[Any, Any]]:
    """Return each list, dict, set and deque among the values or inside of one, with what it holds.

    The tables of parameters, buffers, submodules and hooks are such dicts.
    """
    seen = {id(value) for value in found}
    for value in found:
        for inner in (value.values() if isinstance(value, dict) else value) if value else ():
            if isinstance(inner, _HOLDING) and id(inner) not in seen:
                seen.add(id(inner))
                found.append(inner)
    return [(v, _content(v)) for v in found if not isinstance(v, tuple)]


def _content(container: Any) -> Any:
    if not container:
        return ()  # most tables of hooks are empty
    return dict(container) if isinstance(container, dict) else list(container)


def _refill(container: Any, saved: Any) -> None:
    same = len(container) == len(saved) and all(map(is_, container, saved))
    if same and not (isinstance(container, dict) and any(map(is_not, container.values(), saved.values()))):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(saved)
    else:
        container.extend(saved)


def _optimizer(optimizer: optim.Optimizer, values: bool) -> Callable[[], None]:
    attributes = dict(optimizer.__dict__)
    groups = [dict(group) for group in optimizer.param_groups]
    state = {key: dict(value) for key, value in optimizer.state.items()}
    tensors = [
        (value, files.copy(value))
        for entries in (*state.values(), *groups)
        for value in entries.values()
        if isinstance(value, Tensor) and (values or value.dim() == 0)
    ]

    def restore() -> None:
        for name in set(optimizer.__dict__) - set(attributes):
            del optimizer.__dict__[name]
        optimizer.__dict__.update(attributes)
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(saved)
        optimizer.state.clear()
        optimizer.state.update(state)
        for tensor, value in tensors:
            tensor.detach().copy_(value)

    return restore
