"""`torch.vmap` and the transforms of `torch.func` between closed modules: one opaque node each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from locc.capture.tree import map_plain

_NAMES = ("vmap", "grad", "grad_and_value", "jacrev", "jacfwd", "hessian")

Caller = Callable[[Callable[..., Any], str, tuple[Any, ...], dict[str, Any]], Any]


class Transformed:
    """A transformed function whose closed-over tensors became its first arguments."""

    def __init__(self, function: Callable[..., Any], name: str, free: list[Tensor]) -> None:
        self.function, self.free = function, free
        self.__name__ = self.__qualname__ = name
        self.__module__ = __name__

    def __call__(self, *values: Any, **kwargs: Any) -> Any:
        """Call the function; `values` starts with the tensors that stand for `free`."""
        count = len(self.free)
        replaced = {id(old): new for old, new in zip(self.free, values[:count], strict=True)}
        with _Substitution(replaced):
            return self.function(*values[count:], **kwargs)


class _Substitution(TorchFunctionMode):
    def __init__(self, replaced: dict[int, Tensor]) -> None:
        super().__init__()
        self.replaced = replaced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = map_plain((args, kwargs or {}), lambda value: self.replaced.get(id(value), value))
        return func(*args, **kwargs)


class Collecting(TorchFunctionMode):
    """Finds the tensors that a function uses without getting them as arguments."""

    def __init__(self, known: Callable[[Tensor], bool], as_fake: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.known, self.as_fake = known, as_fake
        self.free: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = map_plain((args, kwargs or {}), self._visit)
        return func(*args, **kwargs)

    def _visit(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not self.known(value):
            return value
        self.free[id(value)] = value
        return self.as_fake(value)


@contextmanager
def transforms_patched(called: Caller) -> Iterator[None]:
    """Send calls of transformed functions on this thread to `called(function, name, args, kwargs)`."""
    thread = threading.get_ident()
    places = [(torch.func, name) for name in _NAMES] + [(torch, "vmap")]
    originals = [getattr(place, name) for place, name in places]

    def patched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def transform(*args: Any, **kwargs: Any) -> Any:
            function = original(*args, **kwargs)
            if threading.get_ident() != thread or not callable(function):
                return function
            return lambda *given, **named: called(function, name, given, named)

        return transform

    for (place, name), original in zip(places, originals, strict=True):
        setattr(place, name, patched(name, original))
    try:
        yield
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)
