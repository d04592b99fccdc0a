"""docs/models.md: what works, and what is refused and why."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks.sweep.entries import EXPORT, Record, Results

OUTCOMES = {
    "ok": "compiled, and took a training step with a finite loss",
    "refused": "locc says why not",
    "error": "an error that locc did not expect",
    "time": "over the time limit",
    "memory": "over the memory limit",
    "crash": "the process ended",
}
_SHORT = {"ok": "✓", "time": "time", "memory": "mem", "crash": "crash", "": ""}


def report(results: Results) -> str:
    """Return the page for the outcomes in a file of results."""
    records = list(results.records.values())
    absent = sorted({r.key for r in records} - {r.key for r in records if r.outcome != "absent"})
    broken = {r.key: r.text for r in records if r.outcome == "broken"}
    tried = [r for r in records if r.outcome != "absent" and r.key not in broken]
    reasons = _Reasons(tried)
    parts = [
        _head(results, tried),
        _by_method(tried),
        _by_model(tried, reasons),
        reasons.section(),
        _list("Absent", "The installed libraries have no such model.", absent),
        _list(
            "Not trainable here",
            "The model itself, without locc, raises this error when it is made, run, or differentiated.",
            [f"{key}: {_line(text)}" for key, text in sorted(broken.items())],
        ),
    ]
    return "\n".join(part for part in parts if part)


class _Reasons:
    """Messages that differ only in names and numbers, each with a label to refer to."""

    def __init__(self, records: Iterable[Record]) -> None:
        alike: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in records:
            if record.outcome in ("refused", "error"):
                alike[record.outcome, _pattern(record.text)].append(record)
        self.groups: dict[str, list[Record]] = {}
        self.labels: dict[tuple[str, str, int | str], str] = {}
        count: Counter[str] = Counter()
        for (outcome, _), found in sorted(alike.items(), key=lambda item: -len(item[1])):
            count[outcome] += 1
            label = f"{outcome[0]}{count[outcome]}"
            self.groups[label] = found
            self.labels |= {r.trial: label for r in found}

    def cell(self, record: Record | None) -> str:
        if record is None:
            return ""
        label = self.labels.get(record.trial)
        return f"[{label}](#{label})" if label else _SHORT[record.outcome]

    def section(self) -> str:
        lines = []
        for kind, title in (("r", "Refusals"), ("e", "Errors")):
            groups = {label: found for label, found in self.groups.items() if label[0] == kind}
            if groups:
                lines.append(f"## {title}\n")
            for label, found in groups.items():
                lines += [f'<a id="{label}"></a>**{label}**, {_where(found)}: {_line(found[0].text)}\n']
        return "\n".join(lines)


def _pattern(text: str) -> str:
    """Return a message without its names and numbers."""
    text = re.sub(r"at \S+\.py:\d+:[^\n]*", "at …", _anywhere(text))
    text = re.sub(r"'[^']*'(, '[^']*')*( and \d+ more)?", "'…'", text)
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)", "[…]", text)
    return re.sub(r"\d[\d.,]*", "n", text)[:300]


def _anywhere(text: str) -> str:
    """Return a message without the folder that libraries are installed in."""
    return re.sub(r"/\S*/site-packages/", "", text)


def _where(found: Sequence[Record]) -> str:
    methods: dict[str, list[str]] = defaultdict(list)
    for record in found:
        methods[record.key].append(record.method)
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, names in methods.items():
        shared[tuple(dict.fromkeys(names))].append(key)
    return "; ".join(f"{', '.join(names)} on {_some(keys)}" for names, keys in shared.items())


def _some(keys: Sequence[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _line(text: str, most: int = 700) -> str:
    """Return a message as one line of Markdown."""
    flat = " ".join(_anywhere(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return flat if len(flat) <= most else f"{flat[:most]}…"


def _head(results: Results, tried: Sequence[Record]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.headers[0]["versions"].items())
    commands = "\n".join(dict.fromkeys(header["command"] for header in results.headers))
    models = {r.key for r in tried}
    working = {r.key for r in tried if r.outcome == "ok"}
    counts = Counter(key.split("/")[0] for key in models)
    libraries = ", ".join(f"{count} of {library}" for library, count in counts.items())
    return f"""# Models

What locc compiles of the big libraries: one model of each family, with random weights, small inputs and
batches of two. Made by `make sweep`; nothing here is written by hand.

- {versions}
- {len(models)} models ({libraries}); {len(working)} compile with at least one method
- each method cuts the model into four modules of balanced cost (`splits=4`), everything else at its default
- ✓: how many methods work ({OUTCOMES["ok"]}); otherwise, r: {OUTCOMES["refused"]};
  e: {OUTCOMES["error"]}; time, mem: {OUTCOMES["time"]}, or the memory limit; crash: {OUTCOMES["crash"]}
- named: `dgl` cut where a user of the family would (`blocks.*`)
- onnx: the model that `bp` trained is exported, and onnxruntime agrees with PyTorch at three batch sizes

```sh
{commands}
```
"""


def _by_method(tried: Sequence[Record]) -> str:
    lines = ["## By method\n", f"| | {' | '.join(OUTCOMES)} | seconds to compile: median | most |"]
    lines.append("|---" + "|---:" * (len(OUTCOMES) + 2) + "|")
    for name, records in _columns(tried).items():
        found = Counter(r.outcome for r in records)
        stage = "export" if name == EXPORT else "compile"
        seconds = [r.facts[stage] for r in records if r.outcome == "ok" and stage in r.facts]
        times = f"{median(seconds):.1f} | {max(seconds):.1f}" if seconds else " | "
        counts = " | ".join(str(found[outcome] or "") for outcome in OUTCOMES)
        lines.append(f"| {name} | {counts} | {times} |")
    return "\n".join(lines) + "\n"


def _by_model(tried: Sequence[Record], reasons: _Reasons) -> str:
    columns = list(_columns(tried))
    apart = [column for column in columns if column in ("named", EXPORT)]
    methods = [column for column in columns if column not in apart]
    titles = ["model", "family", "parameters", "✓", "otherwise", *apart]
    lines = []
    for library in dict.fromkeys(r.key.split("/")[0] for r in tried):
        lines += [
            f"## {library}\n",
            f"| {' | '.join(titles)} |",
            "|---|---|---:|---:|---" + "|---" * len(apart) + "|",
        ]
        models: dict[str, dict[str, Record]] = defaultdict(dict)
        for record in tried:
            if record.key.startswith(f"{library}/"):
                models[record.key][_column(record)] = record
        for key, found in sorted(models.items()):
            first = next(iter(found.values()))
            size = max(r.facts.get("parameters", 0) for r in found.values())
            cells = [reasons.cell(found.get(column)) for column in methods]
            row = [key.partition("/")[2], first.family, f"{size / 1e6:.2f} M", str(cells.count(_SHORT["ok"]))]
            row += [_otherwise(methods, cells), *(reasons.cell(found.get(column)) for column in apart)]
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


def _otherwise(methods: Sequence[str], cells: Sequence[str]) -> str:
    """Return what became of the methods that do not work, those with the same fate together."""
    alike: dict[str, list[str]] = defaultdict(list)
    for method, cell in zip(methods, cells, strict=True):
        if cell != _SHORT["ok"]:
            alike[cell or "not tried"].append(method)
    return "; ".join(
        f"{fate}: {'all' if len(found) == len(methods) else ', '.join(found)}"
        for fate, found in alike.items()
    )


def _columns(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records by column: methods by name, then named splits, then the export."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[_column(record)].append(record)
    return dict(sorted(found.items(), key=lambda item: (item[0] == EXPORT, item[0] == "named", item[0])))


def _column(record: Record) -> str:
    return "named" if isinstance(record.splits, str) else record.method


def _list(title: str, text: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    return f"## {title}\n\n{text}\n\n" + "\n".join(f"- {item}" for item in items) + "\n"
