"""Tells two losses apart by what they do: their code, its constants, and the values that they hold."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, types.EllipsisType)


@dataclass(frozen=True)
class Fingerprint:
    """What a checkpoint keeps of a loss.

    Attributes:
        name: of the function, and where it was written.
        digest: of all that could be compared.
        python: the version of Python, whose bytecode the digest holds.
        opaque: what it holds of which only the type could be compared.
    """

    name: str
    digest: str
    python: str
    opaque: tuple[str, ...]


def fingerprint(function: Any) -> Fingerprint:
    """Return the fingerprint of a loss, by name or as a callable, with what it holds at this moment."""
    opaque: list[str] = []
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(function, "loss", opaque, set()):
        digest.update(part.encode() + b"\0")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Fingerprint(_name(function), digest.hexdigest(), python, tuple(dict.fromkeys(opaque)))


def _name(function: Any) -> str:
    code = getattr(function, "__code__", None)
    name = function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)
    where = f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})" if code is not None else ""
    return f"{name}{where}"


def _parts(value: Any, where: str, opaque: list[str], seen: set[int]) -> Iterator[str]:
    """Yield texts that tell a value from others; `where` is its name for what stays opaque."""
    if isinstance(value, PLAIN):
        yield repr(value)
        return
    yield type(value).__qualname__
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        children = [(str(key), item) for key, item in items]
    elif isinstance(value, Tensor):
        yield f"{tuple(value.shape)} {value.dtype}"
        # What trains has other values in each run, and they are the model's.
        constant = not value.requires_grad and value.layout is torch.strided and value.device.type != "meta"
        children = [("values", value.detach().cpu().tolist())] if constant else []
    elif isinstance(value, functools.partial):
        children = [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif isinstance(value, types.MethodType):
        children = [("function", value.__func__), (where, value.__self__)]
    elif isinstance(value, types.FunctionType) and not _installed(value):
        children = list(_held(value, value.__code__))
    elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)):
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        children = []
    elif isinstance(value, nn.Module):
        yield from (type(m).__qualname__ for m in value.modules())
        kept = {**vars(value), **value._buffers}
        children = [(k, v) for k, v in kept.items() if not k.startswith("_") and k != "training"]
    else:
        called = inspect.getattr_static(type(value), "__call__", None)
        children = [("call", called)] if isinstance(called, types.FunctionType) else []
        children += sorted(getattr(value, "__dict__", {}).items())
        if not children:
            opaque.append(f"'{where}' ({type(value).__name__})")
    for name, child in children:
        yield name
        yield from _parts(child, name if not name.isdigit() else where, opaque, seen)


def _installed(function: types.FunctionType) -> bool:
    """Whether a function is PyTorch's: told by its name, for its code is another's business."""
    return function.__module__.partition(".")[0] == "torch"


def _held(function: types.FunctionType, code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """Yield the code of a function and every value on which it depends."""
    yield from _written(code)
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet: a function that closes over itself
            yield name, None
    for name in _names(code):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _written(code: types.CodeType) -> Iterator[tuple[str, Any]]:
    yield "code", code.co_code
    yield "names", (code.co_names, code.co_varnames)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _written(constant)
        elif isinstance(constant, PLAIN) or type(constant) is tuple:
            yield "constant", constant
        else:
            yield "constant", repr(constant)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
