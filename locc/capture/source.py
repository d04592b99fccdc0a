"""Where in the user's code something happened."""

from __future__ import annotations

import ast
import linecache
import os
import sys
from types import FrameType

import torch

_OWN = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,  # torchvision stands beside it
)


_COMPILER = tuple(_OWN[0] + name for name in ("compiler.py", "request.py"))


def user_frame() -> FrameType | None:
    """Return the innermost frame that belongs neither to torch nor to locc.

    None outside of the model's code: who called `compile` is not meant.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name in _COMPILER:
            return None
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


def only_raises() -> bool:
    """Whether the user's statement that runs now raises or does nothing (`assert`, `if ...: raise`)."""
    frame = user_frame()
    if frame is None:
        return False
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))
    except SyntaxError:
        return False
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= frame.f_lineno <= (node.end_lineno or 0)
    ]
    innermost = max(around, key=lambda node: node.lineno, default=None)
    if isinstance(innermost, ast.If):
        return not innermost.orelse and all(isinstance(node, ast.Raise) for node in innermost.body)
    return isinstance(innermost, ast.Assert)
