"""Two observers of PyTorch's dispatcher: which memory is written, and how much is alive.

Both see every operator of the forward and of autograd's backward pass, on real tensors and on tensors
that are only shapes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kernel = Callable[[Any, Any, Any], Any]


def memory_of(tensor: Tensor) -> int | None:
    """Return a key of the memory that a tensor lies in, shared by its views and its `.data`."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have no storage
        return None


def evaluate(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator as PyTorch does."""
    return func(*args, **kwargs)


class Kernels(TorchDispatchMode):
    """Runs every operator by a function (operator, args, kwargs) -> result."""

    def __init__(self, kernel: Kernel = evaluate) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernel = kernel

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch's wrapper against compilation takes longer than what it wraps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        return self.kernel(func, args, kwargs or {})


class Writes(Kernels):
    """Notes the memory that operators write to."""

    def __init__(self, kernel: Kernel = evaluate) -> None:
        super().__init__(kernel)
        self.written: set[int] = set()

    def take(self) -> set[int]:
        """Return what was written since the last call."""
        found, self.written = self.written, set()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it wrote to."""
        kwargs = kwargs or {}
        result = self.kernel(func, args, kwargs)
        if _written_arguments(func):  # most operators write to nothing
            self.written.update(written_by(func, args, kwargs))
        return result


def written_by(func: Any, args: Any, kwargs: Any) -> Iterator[int]:
    """Yield the memory that a call of an operator writes to."""
    for place, name in _written_arguments(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            key = memory_of(tensor) if isinstance(tensor, Tensor) else None
            if key is not None:
                yield key


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return place and name of the arguments that an operator writes to.

    The older batch norms update their running statistics without saying so in their schema; in evaluation
    they do not, but nothing is lost by taking them to: a step never runs in evaluation.
    """
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or ("batch_norm" in func.__name__ and argument.name in ("running_mean", "running_var"))
    )


class Meter(Kernels):
    """Counts the bytes of the storages that come to life, and floating-point operations.

    A storage counts once, from the operator that returned it until it dies: views cost nothing, and what
    autograd saved counts for as long as autograd holds it. What an operator allocates and frees inside
    itself is not seen. What is made while the meter is paused weighs nothing.
    """

    def __init__(self, known: list[Tensor], kernel: Kernel = evaluate) -> None:
        super().__init__(kernel)
        self.live = self.peak = self.operations = 0
        self.paused = False
        self.sizes: dict[int, int] = dict.fromkeys(
            (key for t in known if (key := memory_of(t)) is not None), 0
        )
        self.finalizers: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it returned."""
        kwargs = kwargs or {}
        result = self.kernel(func, args, kwargs)
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.operations += counted(*args, **kwargs, out_val=result)
        for tensor in _tensors(result):
            key = memory_of(tensor)
            if key is None or key in self.sizes:
                continue
            storage = tensor.untyped_storage()
            self.sizes[key] = 0 if self.paused else storage.nbytes()
            self.live += self.sizes[key]
            self.finalizers[key] = weakref.finalize(storage, self._release, key)
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
        del self.finalizers[key]

    def forget(self) -> None:
        """Stop following the storages that are still alive."""
        for finalizer in self.finalizers.values():
            finalizer.detach()


def _tensors(result: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
