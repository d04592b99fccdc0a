"""docs/results.md: what was measured, beside what was published."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from locc.errors import once
from locc.reproduce.results import Result, Results
from locc.reproduce.table import RECALLED, SETTINGS, Entry, Row, Setting, entries

DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "shakespeare": "tiny-shakespeare"}
HEAD = """# Results

Published networks and recipes, trained again by `locc reproduce`, each beside `bp` on the same network and
the same data. `make reproduce` trains what has the budget "cpu" and writes this page;
`locc reproduce ID --budget full --device cuda` trains as long as published, and goes on where it was cut.

- Numbers are percent correct of the test set, unless said otherwise: the median of the seeds, and the lowest
  and highest; *gap* is the number minus that of `bp`. Seconds are processor time in user mode of one training
  and its test.
- A budget "cpu" is far shorter than the publication's: its numbers say how a method learns beside `bp` in a
  short time, not whether it reaches what was published.
- Published numbers marked * are quoted from memory and were not checked.
- CIFAR-10 is a file of JPEG-compressed images: compare with `bp` here, not with published numbers.
"""


def page(results: Results) -> str:
    """Return the page for a file of results."""
    rows = defaultdict(list)
    for entry in entries().values():
        rows[entry.setting.name].append(entry)
    sections = [HEAD, *(_setting(setting, rows[setting.name], results) for setting in SETTINGS)]
    return "\n".join(section for section in sections if section)


def _setting(setting: Setting, rows: Sequence[Entry], results: Results) -> str:
    parts = [f"## `{setting.name}`: {setting.title}, {DATA[setting.data]}\n"]
    if setting.note:
        parts.append(f"{setting.note}\n")
    for budget in setting.budgets:
        measured = {e.id: _results(e, budget, results) for e in rows}
        if any(measured.values()):
            parts.append(_measured(setting, budget, rows, measured))
    if len(parts) <= 1 + bool(setting.note):
        tried = [r for e in rows for r in _results(e, "try", results)]
        if not tried and setting.every:
            return ""
        parts.append(_unmeasured(setting, rows, tried))
    words = [f"- `{_name(e.row)}`: {e.row.word}" for e in rows if e.row.word]
    return "\n".join([*parts, *words, ""] if words else parts)


def _results(entry: Entry, budget: str, results: Results) -> list[Result]:
    given = entry.budget(budget)
    return [] if given is None else results.of(entry.id, budget, str(given))


def _name(row: Row) -> str:
    return row.name or row.method


def _median(found: Iterable[Result]) -> float | None:
    values = [r.value for r in found if r.value is not None]
    return median(values) if values else None


def _measured(setting: Setting, budget: str, rows: Sequence[Entry], measured: dict[str, list[Result]]) -> str:
    everything = [r for found in measured.values() for r in found]
    base, published = _median(measured[rows[0].id]), rows[0].row.published
    days, machines = sorted({r.date for r in everything}), sorted({r.hardware for r in everything})
    text = (
        f'Budget "{budget}": {setting.budgets[budget]}; {" to ".join(dict.fromkeys([days[0], days[-1]]))}, '
        f"{', '.join(machines)} (`locc reproduce {setting.name} --budget {budget}`).\n"
    )
    digits = 3 if setting.loss else 1
    known = any(e.row.published is not None for e in rows)
    header = ["id", *(["published", "gap published"] if known else [])]
    header += ["test loss" if setting.loss else "measured", "seeds", "gap", "seconds"]
    lines, refused = [], []
    for entry in rows:
        found, row = measured[entry.id], entry.row
        value = _median(found)
        if value is None:
            refused += [(f"'{_name(row)}'", r.error) for r in found[:1]]
            continue
        values = [r.value for r in found if r.value is not None]
        seeds = (
            f"{len(values)} ({min(values):.{digits}f} to {max(values):.{digits}f})"
            if len(values) > 1
            else "1"
        )
        gap = "" if base is None or entry is rows[0] else f"{value - base:+.{digits}f}"
        cells = [f"`{_name(row)}`", *([_told(row), _gap(row, published)] if known else [])]
        cells += [f"{value:.{digits}f}", seeds, gap, f"{median(r.seconds for r in found):.0f}"]
        lines.append((value if setting.loss else 0.0, cells))
    if setting.loss:
        lines.sort(key=lambda line: line[0])
    text += "\n" + _table(header, [cells for _, cells in lines])
    if refused:
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, error in refused:
            reasons[error].append(name.strip("'"))
        told = [
            f"- {', '.join(f'`{n}`' for n in names)}: {once([error])}" for error, names in reasons.items()
        ]
        text += "\nNot there:\n\n" + "\n".join(told) + "\n"
    return text


def _unmeasured(setting: Setting, rows: Sequence[Entry], tried: Sequence[Result]) -> str:
    broken = {r.entry: r.error for r in tried if r.value is None}
    ran = "each" if len(tried) == len(rows) else ", ".join(f"`{r.entry.partition('/')[2]}`" for r in tried)
    runs = f"a few steps of {ran} ran on {tried[0].date}, {tried[0].hardware}" if tried else "not tried"
    text = f"Not measured ({runs}): `locc reproduce {setting.name} --budget full --device cuda`\n\n"
    published = rows[0].row.published
    cells = [[f"`{_name(e.row)}`", _told(e.row), _gap(e.row, published), broken.get(e.id, "")] for e in rows]
    return text + _table(["id", "published", "gap published", ""], cells)


def _told(row: Row) -> str:
    if row.published is None:
        return ""
    return f"{row.published:g}{'*' if row.source == RECALLED else ''}"


def _gap(row: Row, base: float | None) -> str:
    if row.published is None or base is None or row.method == "bp":
        return ""
    return f"{row.published - base:+.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
