"""Keeps PyTorch's log of attempts that may fail off the user's terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
