"""Curves of a training as SVG, to stand in a page: one small chart for each number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 300, 135
LEFT, RIGHT, TOP, BOTTOM = 72, 8, 8, 18
MARKED = 100
"""Up to so many points of a line have a dot, which tells its value when pointed at."""


def chart(title: str, lines: Mapping[str, Sequence[float | None]], at: Sequence[str]) -> str:
    """Return a chart of one number, or of the same one on several data.

    Args:
        title: stands above it.
        lines: values by what they are of; None where there is none, which the line passes over. What is not
            finite breaks it, and is counted below.
        at: the name of each pass over the data, the places on the horizontal axis.
    """
    seen = [v for values in lines.values() for v in values if v is not None]
    drawn = [v for v in seen if math.isfinite(v)]
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 0.0)
    parts = list(_frame(low, high, len(at))) if drawn else []
    for number, (name, values) in enumerate(lines.items()):
        parts += _line(f"line{number % 2}", name, values, (low, high), at)
    key = " ".join(f'<span class="line{i % 2}">{escape(name)}</span>' for i, name in enumerate(lines))
    lost = len(seen) - len(drawn)
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{f' {key}' if len(lines) > 1 else ''}"
        f"{f' <em>not finite at {lost}</em>' if lost else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>{"".join(parts)}</svg>'
        "</figure>"
    )


def _frame(low: float, high: float, passes: int) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    yield f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
    for value in (high, low) if high > low else (low,):
        y = _y(value, low, high) + 4
        yield f'<text x="{LEFT - 5}" y="{y:.1f}" text-anchor="end">{value:.4g}</text>'
    yield f'<text x="{LEFT}" y="{HEIGHT - 4}">pass 1</text>'
    if passes > 1:
        yield f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">pass {passes}</text>'


def _line(
    kind: str, name: str, values: Sequence[float | None], ends: tuple[float, float], at: Sequence[str]
) -> Iterator[str]:
    across = (WIDTH - LEFT - RIGHT) / max(len(at) - 1, 1)
    run: list[str] = []
    marked = sum(v is not None for v in values) <= MARKED
    for i, value in enumerate([*values, math.nan]):
        if value is None:
            continue
        if math.isfinite(value):
            x, y = LEFT + across * i, _y(value, *ends)
            run.append(f"{x:.1f},{y:.1f}")
            if marked:
                told = escape(f"{name}, {at[i]}: {value:.6g}")
                yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2"><title>{told}</title></circle>'
        elif run:
            yield f'<polyline class="{kind}" points="{" ".join(run)}"/>'
            run = []


def _y(value: float, low: float, high: float) -> float:
    span = high / 2 - low / 2  # halves: the whole may be more than a float holds
    share = (value / 2 - low / 2) / span if span > 0 else 0.5
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)
