"""One program in several processes: `schedule="pipelined"`."""

from __future__ import annotations

from .away import Away
from .joint import check_size, count, forget, gather, homes, join, leave, lent, place
from .pace import Pace
from .placement import Cost, measured
from .ranks import END, JUDGED, OVER, PASS, STOP, Ranks, several

__all__ = [
    "END",
    "JUDGED",
    "OVER",
    "PASS",
    "STOP",
    "Away",
    "Cost",
    "Pace",
    "Ranks",
    "check_size",
    "count",
    "forget",
    "gather",
    "homes",
    "join",
    "leave",
    "lent",
    "measured",
    "place",
    "several",
]
