"""One program in several processes: `schedule="pipelined"`."""

from __future__ import annotations

from .joint import check_stages, forget, gather, join, place
from .placement import Cost, measured
from .ranks import END, OVER, PASS, STOP, Ranks

__all__ = [
    "END",
    "OVER",
    "PASS",
    "STOP",
    "Cost",
    "Ranks",
    "check_stages",
    "forget",
    "gather",
    "join",
    "measured",
    "place",
]
