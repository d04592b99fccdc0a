"""Quick shape inference on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from locc.proof.experiment.dispatch import memory_of, written_by

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]

_TENSORS, _STRIDED = {Tensor, torch.nn.Parameter}, torch.strided
_KNOWN: dict[Any, tuple[Layout | None, ...] | None] = {}
_MOST = 1 << 15
"""So many results are remembered, over all programs of the process."""


class RealTensorError(Exception):
    """A step on shapes reaches for a real tensor of the program."""


class Shapes:
    """Runs operators on shapes, and remembers the layout of what they return.

    PyTorch works it out in Python at every call, which is most of the cost of a step on shapes; a network's
    modules repeat the same few calls. Nothing may write to the `protected` memory, which is real.
    """

    def __init__(self) -> None:
        self.protected: set[int] = set()

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what the operator returns, without a kernel where its layout is known."""
        if kwargs.get("device") is not None:  # the graph names the device on which the model was captured
            kwargs = {**kwargs, "device": torch.device("meta")}
        try:
            key = (func, *_key(args), *_key(kwargs.items())) if kwargs else (func, *_key(args))
            known = _KNOWN.get(key, ())
        except (_UnknownError, TypeError):  # a real tensor, or an argument without a hash
            if self.protected.intersection(written_by(func, args, kwargs)):
                raise RealTensorError(f"{func} would change a real tensor of the program") from None
            return func(*args, **kwargs)
        if known:
            made = [
                None if k is None else torch.empty_strided(*k[:2], dtype=k[2], device="meta") for k in known
            ]
            return made[0] if len(func._schema.returns) < 2 else tuple(made)
        if known is not None:
            result = func(*args, **kwargs)
            if len(_KNOWN) >= _MOST:
                _KNOWN.clear()
            _KNOWN[key] = _layouts(func, result, (args, kwargs))
            return result
        if _in_place(func):
            return args[0]
        return func(*args, **kwargs)


class _UnknownError(Exception):
    """An argument whose shape says too little."""


def _key(values: Any) -> tuple[Any, ...]:
    """Describe arguments by layout, and constants by type and value: 1, 1.0 and True are different."""
    return tuple([_describe(value) for value in values])


def _describe(value: Any) -> Any:
    kind = value.__class__
    if kind in _TENSORS:
        if not value.is_meta or value.layout is not _STRIDED:
            raise _UnknownError
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, Tensor):
        raise _UnknownError
    return (kind, *_key(value)) if isinstance(value, (list, tuple)) else (kind, value)


@cache
def _in_place(func: Any) -> bool:
    """Whether an operator changes its first argument, and returns just that."""
    schema = func._schema
    written = [a for a in schema.arguments if a.alias_info is not None]
    return (
        len(schema.returns) == 1
        and len(written) == 1
        and written[0].name == schema.arguments[0].name
        and written[0].alias_info.is_write
        and not func.__name__.startswith(
            ("resize", "set_", "t_", "transpose_", "squeeze", "unsqueeze", "as_strided")
        )
        and isinstance(schema.returns[0].type, torch.TensorType)
    )


def _layouts(func: Any, result: Any, arguments: Any) -> tuple[Layout | None, ...] | None:
    """Return the layouts of fresh tensors; None for views, in-place operators and anything else."""
    if any(a.alias_info is not None for a in func._schema.arguments):
        return None
    found = result if isinstance(result, tuple) else (result,)
    if not found or not all(r is None or (isinstance(r, Tensor) and r.is_meta) for r in found):
        return None
    read = {memory_of(t) for t in tree_leaves(arguments) if isinstance(t, Tensor)}
    if any(memory_of(r) in read for r in found if r is not None):  # a view whose schema does not say so
        return None
    return tuple(None if r is None else (r.shape, r.stride(), r.dtype) for r in found)
