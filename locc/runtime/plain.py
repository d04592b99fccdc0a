"""What an optimizer or a scheduler keeps beside tensors, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from locc.errors import CheckpointError


def plain(value: Any, what: str) -> Any:
    """Return a value as JSON keeps it, tensors of one element included.

    Raises:
        CheckpointError: JSON cannot keep it; `what` says whose it is.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return {"__tensor__": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"__dict__": [[plain(k, what), plain(v, what)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [plain(v, what) for v in value]}
    if isinstance(value, list):
        return [plain(v, what) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"the {what} holds a {type(value).__name__}, which a checkpoint without pickle cannot keep"
    )


def restored(value: Any) -> Any:
    """Return what `plain` made JSON of."""
    if isinstance(value, list):
        return [restored(v) for v in value]
    if isinstance(value, dict):
        if "__tensor__" in value:
            return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"]))
        if "__tuple__" in value:
            return tuple(restored(v) for v in value["__tuple__"])
        return {restored(k): restored(v) for k, v in value["__dict__"]}
    return value
