"""Calls that neither proxies nor a torch-function mode can see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Applier = Callable[[type[torch.autograd.Function], Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def functions_patched(applied: Applier) -> Iterator[None]:
    """Send `Function.apply` of custom autograd functions on this thread to `applied`.

    Traced through, a custom function would keep its forward and lose its backward.
    """
    original = torch.autograd.Function.__dict__["apply"]
    thread = threading.get_ident()

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            return original.__func__(cls, *args, **kwargs)

        return applied(cls, call, args, kwargs) if threading.get_ident() == thread else call()

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
