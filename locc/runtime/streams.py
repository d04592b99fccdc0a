"""Random streams, and the contexts in which a step runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def stream(seed: int, step: int, node: str, repetition: int = 0) -> int:
    """Return the seed of one node that draws (or of one update): the same under every plan and schedule."""
    text = f"{seed}/{step}/{node}/{repetition}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def of_update(owner: str) -> str:
    """Return the name of the stream from which an owner's optimizer draws."""
    return f"update of {owner}"


def of_backward(scalar: str) -> str:
    """Return the name of the stream from which the backward pass of a scalar draws."""
    return f"backward of {scalar}"


def seed_all(seed: int) -> None:
    """Seed the generators that modules draw from, without the bookkeeping of `torch.manual_seed`."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leave the user's own random state as it was."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return the autocast context of a segment; without a dtype the surrounding state stays."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
