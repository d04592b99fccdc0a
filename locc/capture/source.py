"""Where in the user's code something happened."""

from __future__ import annotations

import linecache
import os
import sys
from types import FrameType

import torch

_OWN = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,  # torchvision stands beside it
)


def user_frame() -> FrameType | None:
    """Return the innermost frame that belongs neither to torch nor to locc."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN) and not name.startswith("<"):
            return frame
        frame = frame.f_back
    return None


def user_line() -> str | None:
    """Return `file:line` of the user's code that runs now."""
    frame = user_frame()
    return None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def user_code() -> str:
    """Return `file:line: source text` of the user's code that runs now."""
    frame = user_frame()
    if frame is None:
        return "unknown place"
    name, line = frame.f_code.co_filename, frame.f_lineno
    return f"{name}:{line}: {linecache.getline(name, line).strip()}"
