"""A program and its training as one HTML page, which needs no network and no script to be read."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path

import torch

from locc.curves import chart
from locc.errors import LoccError
from locc.facts import Certificate
from locc.facts.page import flow_lines, locking_text, size
from locc.facts.records import OwnerFacts
from locc.publishing import replacing
from locc.runtime import Compiled
from locc.runtime.history import Epoch, History
from locc.runtime.settings import Settings
from locc.version import __version__

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --a: #1f66b5; --b: #c2571a; --ok: #1a7f37;
  --warn: #b35900 }
@media (prefers-color-scheme: dark) { :root { --a: #6cb0f5; --b: #f0a070; --ok: #4ac26b; --warn: #e8a13a } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1.2em }
h1 { font-size: 1.6em; margin: 0 } h2 { font-size: 1.2em; margin: 2em 0 .6em }
h3 { font-size: 1em; margin: 1.2em 0 .4em } small, .soft { opacity: .75 } .state { font-weight: 600 }
.held { color: var(--ok) } .open { color: var(--warn) }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; margin: 1.2em 0 }
.tiles div { background: var(--soft); border-radius: .5em; padding: .5em 1em }
.tiles b { display: block; font-size: 1.3em; font-variant-numeric: tabular-nums }
table { border-collapse: collapse; width: 100% } .wide { overflow-x: auto } .wide table { font-size: .85em }
th, td { padding: .35em 1em .35em 0; border-bottom: 1px solid var(--line); text-align: left }
th, td { vertical-align: top; overflow-wrap: break-word } .facts th { width: 11em; font-weight: 600 }
a { color: var(--a) } .facts td { overflow-wrap: anywhere } .wide th { white-space: nowrap }
.wide td { min-width: 4em; max-width: 24em }
.wide td:nth-child(n+5) { min-width: 8em } .wide td:last-child { min-width: 0 }
td:first-child div:first-child { font-weight: 600 } tr.aux td:first-child { padding-left: 1.2em }
td div + div { margin-top: .2em }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5em, 1fr)); gap: 1em 1.2em }
figure { margin: 0; min-width: 0 } figcaption { font-size: .85em; overflow-wrap: anywhere }
figcaption em { color: var(--warn) } figcaption span { margin-left: .6em }
svg { display: block; width: 100% } svg text { font-size: 11px; fill: currentColor; opacity: .75 }
.axis { fill: none; stroke: var(--line) } polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
polyline.line0 { stroke: var(--a) } polyline.line1 { stroke: var(--b); stroke-dasharray: 5 2 }
circle.line0 { fill: var(--a) } circle.line1 { fill: var(--b) }
span.line0 { color: var(--a) } span.line1 { color: var(--b) } span.line0::before { content: "\\2014 " }
span.line1::before { content: "- - " }
details { border-bottom: 1px solid var(--line); padding: .5em 0 } summary { cursor: pointer }
pre { overflow-x: auto; font-size: .85em; background: var(--soft); padding: .8em; border-radius: .5em }
"""


def write(program: Compiled, path: Path, history: History | None) -> Path:
    """Write the page; see `locc.Program.report`."""
    if not (history is None or isinstance(history, History)):
        raise LoccError(f"history= takes what program.fit returns; found {type(history).__name__}")
    if program.ranks is not None and not program.ranks.leads:
        return path
    text = page(program, history)
    if path.is_dir():
        raise LoccError(f"cannot write the report '{path}': it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise LoccError(
            f"cannot write the report '{path}': the folder '{path.parent}' does not exist; create it first"
        )
    try:
        with replacing(path) as made:
            made.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise LoccError(
            f"cannot write the report '{path}': {error.strerror or error}; a file that was there before is "
            "unharmed"
        ) from error
    return path


def page(program: Compiled, history: History | None) -> str:
    """Return the page."""
    certificate = program.certificate
    passes = history.epochs if history is not None else []
    title = escape(f"{program.method} on {type(program.model).__name__}")
    advice = [*certificate.warnings, *map(str, certificate.couplings)]
    parts = [
        f"<h1>{title}</h1>",
        _verdict(certificate, len(advice)),
        _tiles(program, certificate, passes),
        "<h2>Training</h2>",
        _training(certificate, history),
        "<h2>Modules</h2>",
        _modules(program, certificate, passes),
        "<h2>Setup</h2>",
        _facts(_setup(program, certificate)),
        "<h2>In full</h2>",
        '<div id="advice">',
        _folded(f"Warnings and couplings ({len(advice)})", "\n\n".join(advice) or "none"),
        "</div>",
        _folded("The certificate", certificate.text(verbose=True)),
        _folded("Each pass over the data", str(history)) if passes else "",
        _folded("The plan: each module's own program", "\n".join(map(str, program.module_programs.values()))),
        _folded("The training graph (IR)", str(program.ir)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"/>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _verdict(certificate: Certificate, advice: int) -> str:
    held = sum(check.status == "held" for check in certificate.checks)
    kind, state = ("held", "proved local") if certificate.complete else ("open", "not proved")
    checks = f"each objective trains its own module alone; {held} of {len(certificate.checks)} checks held"
    link = f'; <a href="#advice">warnings and couplings: {advice}</a>' if advice else ""
    more = len(certificate.reasons) - 1
    reason = "; ".join(certificate.reasons[:1]) + (f" (and {more} more)" if more > 0 else "")
    return (
        f'<p><span class="state {kind}">{state}</span>: {checks}{link}<br/>'
        f'<span class="state">{escape(certificate.verdict)}</span>: {escape(reason)}</p>'
    )


def _tiles(program: Compiled, certificate: Certificate, passes: Sequence[Epoch]) -> str:
    modules = sum(not owner.auxiliary for owner in certificate.owners)
    found = {"modules": str(modules)}
    found["parameters, with auxiliaries"] = f"{sum(o.count for o in certificate.owners):,}"
    if certificate.memory is not None:
        found[f"estimated peak, batch of {certificate.memory.batch}"] = size(certificate.memory.peak)
    found["training steps"] = f"{program.steps:,}"
    for name, words in (("loss", "training loss"), ("validation_loss", "validation loss")):
        values = [epoch.metrics[name] for epoch in passes if name in epoch.metrics]
        found |= {f"last {words}": f"{values[-1]:.4g}"} if values else {}
    accuracies = [e.validation.accuracy for e in passes if e.validation and e.validation.accuracy is not None]
    if accuracies:
        found[f"last validation accuracy (best: {max(accuracies):.2%})"] = f"{accuracies[-1]:.2%}"
    items = (f"<div><b>{escape(v)}</b><small>{escape(name)}</small></div>" for name, v in found.items())
    return f'<div class="tiles">{"".join(items)}</div>'


def _training(certificate: Certificate, history: History | None) -> str:
    if history is None or not history.epochs:
        why = "No fit of this program has ended a pass over the data yet"
        how = "program.fit(loader, epochs=10, validation=validation_loader)\nprogram.report(path)"
        return (
            f"<p>{why}, so there are no curves. To have them:</p><pre>{how}</pre><p>A history that was "
            "kept is drawn by <code>program.report(path, history)</code>.</p>"
        )
    passes = history.epochs
    at = [f"epoch {e.number}" + (f" [{e.phase}]" if e.phase else "") for e in passes]
    every = {name: [e.metrics.get(name) for e in passes] for e in passes for name in e.metrics}
    lines = {"training": every.pop("loss", []), "validation": every.pop("validation_loss", [])}
    whole = [chart("loss", {name: values for name, values in lines.items() if values}, at)]
    accuracy = every.pop("validation_accuracy", None)
    if accuracy is not None:
        whole.append(chart("validation_accuracy", {"validation": accuracy}, at))
    order = [one.name for owner in certificate.owners for one in owner.objectives]
    names = sorted(every, key=lambda name: order.index(name) if name in order else len(order))
    end = f"; stopped: {history.stopped}" if history.stopped else ""
    end += "; interrupted" if history.interrupted else ""
    seconds = sum(epoch.seconds for epoch in passes)
    count = f"{len(passes)} {'passes' if len(passes) > 1 else 'pass'} over the data"
    return (
        f"<p>{count} in {seconds:,.1f} s{escape(end)}. Means over each pass; every chart has a scale of its "
        f'own. A dot tells its value when pointed at.</p><div class="charts">{"".join(whole)}</div>'
        '<h3>Objectives of each module</h3><div class="charts">'
        + "".join(chart(name, {name: every[name]}, at) for name in names)
        + "</div>"
    )


def _modules(program: Compiled, certificate: Certificate, passes: Sequence[Epoch]) -> str:
    header = ("module", "objectives", "parameters", "auxiliary networks", "receives", "sends", "waits")
    head = "".join(f"<th>{name}</th>" for name in (*header, "peak memory"))
    rows = []
    for owner in certificate.owners:
        notes = ["frozen"] * owner.frozen + ["auxiliary that trains alone"] * owner.auxiliary
        cells = (
            [owner.name, *notes],
            list(_objectives(owner, passes)),
            [f"{owner.count:,}"],
            list(_networks(program, owner)),
            list(flow_lines(certificate.entering(owner.name), "producer")),
            list(flow_lines(certificate.leaving(owner.name), "consumer")),
            locking_text(owner).split("; "),
            ["" if owner.peak_memory is None else size(owner.peak_memory)],
        )
        row = "".join(f"<td>{''.join(f'<div>{escape(t)}</div>' for t in cell)}</td>" for cell in cells)
        rows.append(f'<tr class="{"aux" if owner.auxiliary else "module"}">{row}</tr>')
    return (
        f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div><p class="soft">Parameters '
        "include those of auxiliary networks. Waits: whether a module needs what earlier ones compute "
        "(forward), and whether its update waits for the forward (update) or the backward pass (backward) of "
        "later ones. Peak memory: estimated activations and gradients alive at most while its code runs, in "
        "lockstep.</p>"
    )


def _objectives(owner: OwnerFacts, passes: Sequence[Epoch]) -> Iterator[str]:
    for objective in owner.objectives:
        values = [e.objectives[objective.name] for e in passes if objective.name in e.objectives]
        yield objective.name + (f": {values[0]:.4g} to {values[-1]:.4g}" if values else "")


def _networks(program: Compiled, owner: OwnerFacts) -> Iterator[str]:
    for name in owner.networks:
        network = program.root.aux[name]
        count = sum(parameter.numel() for parameter in network.parameters())
        yield f"{name} ({type(network).__name__}): {count:,}"


def _setup(program: Compiled, certificate: Certificate) -> Iterator[tuple[str, str]]:
    asked, table, memory = program.built.asked, certificate.table, certificate.memory
    settings, executor = program.settings, program.built.executor
    yield "method", asked["method"]
    yield "its options", asked["options"]
    yield "splits", asked["splits"]
    yield "loss", certificate.loss
    yield "trains with", certificate.training
    yield "schedule", settings.schedule
    yield "backend", settings.backend
    yield "offload", str(settings.offload or "none")
    yield "further settings", ", ".join(_further(settings)) or "none"
    for phase in certificate.phases:
        yield "phase", phase
    yield (
        "needs",
        f"auxiliary networks: {_yes(table.auxiliary_model)}; the whole forward pass: "
        f"{_yes(table.forward_pass)}; backward pass: {table.backward_pass}",
    )
    yield "pipeline-exact", f"{_yes(certificate.pipeline_exact)}: {certificate.pipeline_reason}"
    if memory is not None:
        yield (
            "estimated memory",
            f"parameters {size(memory.parameters)}, optimizers {size(memory.optimizer)}, activations and "
            f"gradients {size(memory.peak)} at most, in '{memory.at}', at a batch of {memory.batch}",
        )
    yield "seed", str(executor.seed)
    yield "device", str(executor.device)
    yield (
        "made with",
        f"locc {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
    )
    yield (
        "written",
        f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, after {program.steps:,} steps",
    )


def _further(settings: Settings) -> Iterator[str]:
    """Yield the settings that are not the default, but for those with a line of their own."""
    told = ("optimizer", "schedule", "backend", "offload", "seed")
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in told and value != field.default:
            yield f"{field.name}={value!r}"


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f'<table class="facts">{"".join(cells)}</table>'


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
