"""Every error that locc raises on purpose.

A message states what was asked, what was found and the remedy, in the user's own module names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class LoccError(Exception):
    """Base class of all errors that locc raises on purpose."""


class LoccWarning(UserWarning):
    """What locc says of a program that compiles and may still train badly; the certificate says it, too."""


class CaptureError(LoccError):
    """The model could not be turned into a graph that computes what the model computes."""


class SplitError(LoccError):
    """The split points do not describe a partition of the model."""


class MethodError(LoccError):
    """A method is unknown, was given a wrong option, or is undefined on this model."""


class LocalityError(LoccError):
    """A gradient or a state change crosses a module boundary.

    `findings` holds what the checks found, one `locc.verify.findings.Finding` each.
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


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a remedy clause that names the known names closest to `name`, or lists a few."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(repr(n) for n in close)
    shown = ", ".join(repr(n) for n in names[:8])
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return f"known: {shown}{more}" if names else "there are none"
