"""What is equal for operations that yield the same shapes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx, nn

from locc.ir.calls import is_size

_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN = (int, float, str, type(None), torch.dtype, torch.device, FunctionType, BuiltinFunctionType)


def likeness(value: Any, modules: Mapping[fx.Node, nn.Module]) -> Hashable:
    """Return what is equal for two arguments (or targets) with which an operation yields the same shapes.

    A node stands for its spec, one among `modules` for the module that it reads, and a size for what it is
    made of.
    """
    if isinstance(value, fx.Node):
        if is_size(value):
            return ("size", value.op, value.target, likeness(value.args, modules))
        held = modules.get(value)
        return ("node", likeness(value.meta.get("spec") if held is None else held, modules))
    if isinstance(value, nn.Module):
        return _structure(value)
    if isinstance(value, (tuple, list)):
        return (type(value), *(likeness(v, modules) for v in value))
    if isinstance(value, dict):
        return (dict, *((k, likeness(v, modules)) for k, v in value.items()))
    if isinstance(value, slice):
        return (slice, *(likeness(v, modules) for v in (value.start, value.stop, value.step)))
    hash(value)
    return (type(value), value)


def _structure(module: nn.Module) -> Hashable:
    """Describe a module by its class, settings, shapes and parts; by itself where that may not do."""
    settings = [(n, type(v), v) for n, v in vars(module).items() if n not in _TABLES and not _is_empty(v)]
    if not all(_is_plain(value) for *_, value in settings):
        return module  # hooks, a tensor, and what else may decide
    tensors = tuple(
        (name, None if tensor is None else (tensor.shape, tensor.dtype))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    parts = tuple((n, None if m is None else _structure(m)) for n, m in module._modules.items())
    return (type(module), tuple(settings), tensors, parts)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (dict, list, set)) and not value


def _is_plain(value: Any) -> bool:
    """Whether what is equal to a value, and of its type, does the same."""
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    declared = getattr(value, "__dataclass_params__", None)
    return isinstance(value, _PLAIN) or (declared is not None and declared.frozen)
