"""How a call that was seen at run time is written as a node."""

from __future__ import annotations

import enum
import inspect
import operator
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_MODULE = __name__


def _label(instance: Any, name: str) -> None:
    # torch.fx prints a callable through these three, whatever it is
    instance.__name__ = instance.__qualname__ = name
    instance.__module__ = _MODULE


class Constant:
    """A value that is not a tensor of the model: every call returns it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        _label(self, f"constant_{type(value).__name__}")

    def __call__(self) -> Any:
        """Return the value."""
        return self.value


class Hooked:
    """Registers a tensor hook that the user's forward registers."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        self.hook = hook
        _label(self, "with_hook")

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x`, with the hook on it where it can carry a gradient."""
        if x.requires_grad:
            x.register_hook(self.hook)
        return x


class Applied:
    """`Function.apply` of a custom autograd function."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        _label(self, function.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function, with its own backward."""
        return self.function.apply(*args, **kwargs)


_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Region:
    """The ambient settings that change what an op does."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls) -> Region:
        """Read the settings of this moment."""
        autocast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


class InRegion:
    """One op under `no_grad` or autocast, so that a graph carries the region op by op."""

    def __init__(self, function: Callable[..., Any], region: Region, outside: Region) -> None:
        self.function, self.region, self.outside = function, region, outside
        kind = "no_grad" if region.grad != outside.grad else "autocast"
        _label(self, f"{kind}_{getattr(function, '__name__', 'op').strip('_')}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the op with the region's settings."""
        with ExitStack() as stack:
            if self.region.grad != self.outside.grad:
                stack.enter_context(torch.set_grad_enabled(self.region.grad))
            for setting, before in zip(self.region.autocast, self.outside.autocast, strict=True):
                if setting != before:
                    device, enabled, dtype = setting
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            return self.function(*args, **kwargs)


Target = tuple[str, Any, tuple[Any, ...]]
"""(op, target, args) of a node."""

_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_SWAPPED = {f"__r{name}__": name for name in _ARITHMETIC}
_NOT_OPERATORS = {"__len__", "__iter__", "__contains__", "__index__", "__call__"}


def getter_of(function: Any) -> str | None:
    """Return the attribute that a property getter reads, or None for another function."""
    if getattr(function, "__name__", "") != "__get__":
        return None
    return str(getattr(getattr(function, "__self__", None), "__name__", "")) or None


def callable_of(func: Any) -> Callable[..., Any]:
    """Return what to call for a torch function, which may be a property getter."""
    name = getter_of(func)
    return func if name is None else operator.attrgetter(name)


def name_of(function: Any) -> str:
    """Return the name of a torch function or tensor method."""
    return getter_of(function) or str(getattr(function, "__name__", type(function).__name__))


def target_of(function: Any, args: tuple[Any, ...]) -> Target:
    """Return how a node says `function(*args)`."""
    name, getter = name_of(function), getter_of(function)
    if getter is not None:
        return "call_function", getattr, (args[0], getter)
    # `x ** y` arrives as `Tensor.__pow__`, which calls itself "pow".
    spellings = (name, f"__{name}__", f"__i{name.rstrip('_')}__")
    found = (n for n in spellings if function is getattr(torch.Tensor, n, None))
    if (method := next(found, None)) is None:
        return "call_function", function, args
    name = method
    if name in _SWAPPED:
        return "call_function", getattr(operator, _SWAPPED[name]), (args[1], args[0])
    plain = name.removeprefix("__").removesuffix("__")
    if name.startswith("__") and name not in _NOT_OPERATORS:
        spelled = getattr(operator, plain, None) or getattr(operator, plain + "_", None)
        if spelled is not None:
            return "call_function", spelled, args
    return "call_method", name, args


_ATOMS = (int, float, bool, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device,
          torch.memory_format, torch.layout)  # fmt: skip


def printable(value: Any) -> bool:
    """Whether a constant can stand in a node's arguments as it is."""
    if isinstance(value, slice):
        return all(printable(v) for v in (value.start, value.stop, value.step))
    return type(value) in _ATOMS


def unchanging(value: Any) -> bool:
    """Whether an object that is no tensor holds no state that a forward passes along."""
    kinds = (enum.Enum, type, torch.Generator, range, frozenset)
    return isinstance(value, kinds) or printable(value) or inspect.isroutine(value)


def is_access(node: fx.Node) -> bool:
    """Whether a node only reads a part or a size, so that without users it can go."""
    if node.op == "get_attr":
        return True
    if node.op == "call_method":
        return node.target == "size"
    return node.op == "call_function" and (
        node.target in (operator.getitem, getattr) or isinstance(node.target, Constant)
    )
