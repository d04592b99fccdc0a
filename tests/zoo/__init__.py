"""Tiny models of every kind that locc claims to compile, for any test to run over."""

from __future__ import annotations

from zoo import hf, sequence, special, vision
from zoo.case import Case

CASES: list[Case] = [*special.CASES, *vision.CASES, *sequence.CASES, *hf.CASES]
REFUSED: list[Case] = special.REFUSED


def find(name: str) -> Case:
    """Return the case of a name."""
    return next(case for case in (*CASES, *REFUSED) if case.name == name)


__all__ = ["CASES", "REFUSED", "Case", "find"]
