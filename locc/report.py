"""A program and its training as one HTML page: what was proved, what each module does, how it has learnt."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from rich import filesize

from locc.errors import LoccError
from locc.facts import Certificate
from locc.facts.records import OwnerFacts
from locc.runtime import Compiled
from locc.runtime.history import History
from locc.version import __version__

WIDTH, HEIGHT, MARGIN = 260, 120, 6
STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #2563a8; --other: #c2571a }
@media (prefers-color-scheme: dark) { :root { --ink: #7db4f0; --other: #f0a070 } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse }
th, td { padding: .25em 1em .25em 0; border-bottom: 1px solid var(--line) }
th, td { text-align: left; vertical-align: top }
.wide { overflow-x: auto } .charts { display: flex; flex-wrap: wrap; gap: 1.2em }
figure { margin: 0 } figcaption, .ends { font-size: .85em }
.ends { display: flex; justify-content: space-between }
svg { display: block; border: 1px solid var(--line) } pre { overflow-x: auto; font-size: .85em }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5 } circle { fill: currentColor }
.ink { color: var(--ink) } .other { color: var(--other) }
"""


def write(program: Compiled, path: Path, history: History | None) -> Path:
    """Write the page.

    Args:
        program: one that has been proved.
        path: of the file; one that exists is replaced.
        history: of its last `fit`; None for a page without curves.

    Raises:
        LoccError: the file cannot be written; one that was there is as it was.
        RunError: the program was compiled with verify=False, or without example inputs and made no step yet.
    """
    text = page(program, history)
    made = path.with_name(f".{path.name}.locc")
    try:
        made.write_text(text, encoding="utf-8")
        made.replace(path)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise LoccError(f"cannot write the report '{path}': {error.strerror or error}") from error
    return path


def page(program: Compiled, history: History | None) -> str:
    """Return the page."""
    certificate = program.certificate
    model = type(program.model).__name__
    title = f"{certificate.method} on {model}"
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(certificate.verdict)}</p>",
        _table((), _program(program, certificate)),
        _warnings(certificate.warnings),
        "<h2>Training</h2>" + _training(history),
        "<h2>Modules</h2>" + _modules(program, certificate),
        "<h2>In full</h2>",
        _folded("certificate", certificate.text(verbose=True)),
        _folded(
            "what each module receives, runs and sends", "\n".join(map(str, program.module_programs.values()))
        ),
        _folded("the graph of a training step", str(program.ir)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _program(program: Compiled, certificate: Certificate) -> Iterator[tuple[str, str]]:
    settings, table, memory = program.settings, certificate.table, certificate.memory
    yield "proved by", "; ".join(f"{check.name}: {check.status}" for check in certificate.checks)
    yield "loss", certificate.loss
    yield "trains with", certificate.training
    yield "schedule", " ".join(filter(None, [settings.schedule, f"backend={settings.backend}"]))
    yield "done", f"{program.steps} steps, {program.epochs} passes over the data"
    yield "pipeline-exact", f"{'yes' if certificate.pipeline_exact else 'no'}: {certificate.pipeline_reason}"
    yield "auxiliary networks needed", "yes" if table.auxiliary_model else "no"
    yield "whole forward pass needed", "yes" if table.forward_pass else "no"
    yield "backward pass needed", table.backward_pass
    if memory is not None:
        parameters, optimizer, peak = map(
            filesize.decimal, (memory.parameters, memory.optimizer, memory.peak)
        )
        yield (
            "memory, estimated",
            f"parameters {parameters}, optimizer {optimizer}; activations and gradients of a step with "
            f"{memory.batch} samples {peak}, in '{memory.at}'",
        )
    yield (
        "made with",
        f"locc {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    )


def _warnings(found: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f"<h2>Warnings</h2><ul>{items}</ul>" if found else ""


def _training(history: History | None) -> str:
    if history is None or not history.epochs:
        return "<p>There are no curves: this program has not been trained by fit since it was made.</p>"
    curves: dict[str, list[float | None]] = {}
    for number, epoch in enumerate(history.epochs):
        for name, value in epoch.metrics.items():
            curves.setdefault(name, [None] * len(history.epochs))[number] = value
    charts = []
    for name, values in curves.items():
        beside = curves.get(f"validation_{name}")
        if not (name.startswith("validation_") and name.removeprefix("validation_") in curves):
            charts.append(_chart(name, values, beside))
    last = history.epochs[-1]
    seconds = sum(epoch.seconds for epoch in history.epochs)
    ends = f"{len(history.epochs)} passes in {seconds:.1f} s; the last one: {last}"
    if history.interrupted or history.stopped:
        ends += f"; {history.stopped or 'interrupted'}"
    return f'<p>{escape(ends)}</p><div class="charts">{"".join(charts)}</div>'


def _chart(name: str, values: Sequence[float | None], beside: Sequence[float | None] | None) -> str:
    """Return a chart of a metric over the passes, with that of the validation beside it, if there is one."""
    drawn = [v for v in (*values, *(beside or ())) if v is not None and math.isfinite(v)]
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 0.0)
    caption = f'<span class="ink">{escape(name)}</span>'
    if beside is not None:
        caption += ' <span class="other">validation</span>'
    lines = _line(values, low, high, "ink") + ("" if beside is None else _line(beside, low, high, "other"))
    return (
        f'<figure><figcaption>{caption}</figcaption><svg width="{WIDTH}" height="{HEIGHT}" role="img">'
        f"<title>{escape(name)}</title>{lines}</svg>"
        f'<div class="ends"><span>{low:.4g} to {high:.4g}</span><span>{len(values)} passes</span></div>'
        "</figure>"
    )


def _line(values: Sequence[float | None], low: float, high: float, kind: str) -> str:
    across, up = (WIDTH - 2 * MARGIN) / max(1, len(values) - 1), HEIGHT - 2 * MARGIN
    points = [
        (MARGIN + across * i, HEIGHT - MARGIN - up * ((v - low) / (high - low) if high > low else 0.5))
        for i, v in enumerate(values)
        if v is not None and math.isfinite(v)
    ]
    if not points:
        return ""
    dots = "".join(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>' for x, y in points)
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{joined}"/>{dots}'


def _modules(program: Compiled, certificate: Certificate) -> str:
    header = ("module", "parameters", "objectives", "receives", "sends", "waits for", "peak of a step")
    traffic = {}
    for name, one in program.module_programs.items():
        receives = ", ".join(f"{r.name} {_shape(r.spec)}from {r.source}" for r in one.receives)
        traffic[name] = (
            receives,
            ", ".join(f"{s.name} {_shape(s.spec)}to {', '.join(s.to)}" for s in one.sends),
        )
    rows = []
    for owner in certificate.owners:
        receives, sends = traffic.get(owner.name, ("", ""))
        peak = "" if owner.peak_memory is None else filesize.decimal(owner.peak_memory)
        name = owner.name + (" (frozen)" if owner.frozen else "")
        objectives = ", ".join(one.name for one in owner.objectives)
        rows.append((name, f"{owner.count:,}", objectives, receives, sends, _waits(owner), peak))
    return f'<div class="wide">{_table(header, rows)}</div>'


def _shape(spec: object) -> str:
    return "" if spec is None else f"{spec} "


def _waits(owner: OwnerFacts) -> str:
    """Return the modules that an owner's update waits for, in words."""
    found: Mapping[str, Sequence[str]] = {
        "the forward of": owner.update_waits_for,
        "the backward pass of": owner.backward_waits_for,
    }
    return (
        "; ".join(f"{what} {', '.join(names)}" for what, names in found.items() if names) or "no later module"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
