"""Every error that locc raises on purpose.

A message states what was asked, what was found and the remedy, in the user's own module names.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import warnings
from collections.abc import Iterable
from typing import Any

_HOME = os.path.dirname(__file__) + os.sep


class LoccError(Exception):
    """Base class of all errors that locc raises on purpose."""


class LoccWarning(UserWarning):
    """What locc says of a program that compiles and may still train badly, or has trained badly."""


def warn(text: str) -> None:
    """Warn, at the line of whoever has called locc."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_HOME):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, LoccWarning, stacklevel=level)


class CaptureError(LoccError):
    """The model could not be turned into a graph that computes what the model computes."""


class SplitError(LoccError):
    """The split points do not describe a partition of the model."""


class MethodError(LoccError):
    """A method is unknown, was given a wrong option, or is undefined on this model."""


class LocalityError(LoccError):
    """A gradient or a state change crosses a module boundary.

    `findings` holds what the checks found, one `locc.proof.findings.Finding` each.
    """

    findings: tuple[Any, ...] = ()


class GraphError(LoccError):
    """A pass left the training graph in a state that breaks an invariant of the IR."""


class RunError(LoccError):
    """A training step cannot go on: non-finite objective, wrong input shape, wrong phase."""


class CheckpointError(LoccError):
    """A checkpoint is torn, foreign, or belongs to another program."""


class ExportError(LoccError):
    """An ONNX file could not be written, or does not compute what PyTorch computes."""


def once(reasons: Iterable[str], most: int = 3) -> str:
    """Join reasons to one text; of those alike but for the names in quotes, the first stands for all."""
    alike: dict[str, list[str]] = {}
    for reason in reasons:
        alike.setdefault(re.sub(r"'[^']*'", "''", reason), []).append(reason)
    return "; ".join(_first(found, most) for found in alike.values())


def _first(reasons: list[str], most: int) -> str:
    first, *rest = dict.fromkeys(reasons)
    if not rest:
        return first
    names = list(dict.fromkeys(_apart(first, other) for other in rest))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{first} (and so for {', '.join(names[:most])}{more}: {len(rest) + 1} in all)"


def _apart(first: str, other: str) -> str:
    """Return the first quoted name of `other` that `first` does not have in the same place."""
    here: list[str] = re.findall(r"'[^']*'", first)
    there: list[str] = re.findall(r"'[^']*'", other)
    return next(b for a, b in zip(here, there, strict=True) if a != b)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a remedy clause that names the known names closest to `name`, or lists a few."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(repr(n) for n in close)
    shown = ", ".join(repr(n) for n in names[:8])
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return f"known: {shown}{more}" if names else "there are none"
