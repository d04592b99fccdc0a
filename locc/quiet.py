"""Keeps attempts that may fail off the user's terminal, and out of what `torch.compile` has compiled."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quiet(name: str = "torch._subclasses.fake_tensor") -> Iterator[None]:
    """Silence a logger, unless it is set to debug; by default that of operations tried on shapes alone."""
    logger = logging.getLogger(name)
    level = logger.level
    if level != logging.DEBUG:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def attempting() -> Iterator[None]:
    """Run the user's code to look at it: quietly, and what `torch.compile` has wrapped eagerly.

    Compiled at our sizes and through our patches, it would soon pass the limit of recompilations, from
    which on it runs eagerly for good.
    """
    with quiet():
        if "torch._dynamo" not in sys.modules:  # nothing is wrapped, and the import takes a second
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield
