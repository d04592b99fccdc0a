"""The four ops that the IR has beyond PyTorch's own, and the helpers that methods share.

Each op is an ordinary function with an eager meaning, so a printed graph can be read, and run, as
Python. The runtime gives them their scheduled meaning (see `locc.lower`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def stop_gradient(x: Tensor) -> Tensor:
    """Return `x` without its tape: the only way for a live value to pass between owners."""
    return x.detach()


def objective(scalar: Tensor) -> Tensor:
    """Declare `scalar` (shape []) a local objective of its owner."""
    return scalar


def gradient(scalar: Tensor, wrt: Tensor) -> Tensor:
    """Return d(scalar)/d(wrt), in the shape of `wrt`, as a value that carries no tape.

    A `wrt` that `scalar` does not depend on has gradient zero.
    """
    if not scalar.requires_grad:
        return torch.zeros_like(wrt)
    (found,) = torch.autograd.grad(scalar, wrt, retain_graph=True, allow_unused=True)
    return torch.zeros_like(wrt) if found is None else found


def assign(parameter: Tensor, value: Tensor) -> Tensor:
    """Set a parameter or state of the owner to `value` (same shape), without a gradient."""
    with torch.no_grad():
        parameter.copy_(value)
    return parameter


def carry(initial: Tensor) -> Tensor:
    """Return `initial` without its tape: the entry of a value into a repeated region, and into each round."""
    return initial.detach()


OPS = (stop_gradient, objective, gradient, assign)


def inner(h: Tensor, g: Tensor) -> Tensor:
    """Return <h, g> (shape []): as an objective, it back-propagates exactly `g` into `h`."""
    return (h * g).sum()


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `module` with some of its parameters or buffers replaced by `tensors`."""
    return torch.func.functional_call(module, dict(tensors), args, kwargs)


def call_quietly(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `module` once more in the same step: its buffers (BatchNorm statistics) stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return torch.func.functional_call(module, buffers, args, kwargs) if buffers else module(*args, **kwargs)


class Rebuild:
    """Puts flat tensors back into the structure that the user's forward returns."""

    def __init__(self, build: Callable[[list[Any]], Any], text: str) -> None:
        self.build = build
        self.__name__ = text
        self.__qualname__ = text
        self.__module__ = "locc.ir.ops"

    def __call__(self, *values: Any) -> Any:
        """Return the structure; one positional argument for each flat value."""
        return self.build(list(values))
