"""`python -m benchmarks.plots`: what `make bench` has measured, as two figures for docs/performance.md.

Time and memory of a step over the number of modules, for each model and backend, as ratios to end-to-end
backpropagation at its fastest; and the time of a pass over the number of processes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contestants import HANDWRITTEN, INDUCTOR, LOCC

LINES = {
    LOCC: ("locc, eager", "C0o-"),
    INDUCTOR: ("locc, inductor", "C1s-"),
    HANDWRITTEN: ("by hand", "C7x:"),
}
"""Label and style of the contestants that are drawn."""


def over_modules(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw time and memory over K, a column for each model; bars are the fastest and the slowest round."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(2.4 * len(models) + 0.6, 4.6), layout="constrained")
    axes = figure.subplots(2, len(models), sharex=True, squeeze=False)
    for model, (time, memory) in zip(models, axes.T, strict=True):
        for contestant, (label, style) in LINES.items():
            found = [row for row in rows if (row["model"], row["contestant"]) == (model, contestant)]
            modules, ratios = [row["modules"] for row in found], [row["time_to_end_to_end"] for row in found]
            middle = [ratio["median"] for ratio in ratios]
            below = [ratio["median"] - ratio["low"] for ratio in ratios]
            above = [ratio["high"] - ratio["median"] for ratio in ratios]
            time.errorbar(modules, middle, (below, above), fmt=style, label=label, elinewidth=0.6, ms=4)
            memory.plot(modules, [row["memory_to_end_to_end"] for row in found], style, ms=4)
        time.set_title(model)
        for axis in (time, memory):
            axis.axhline(1, color="0.6", linewidth=0.8)
            axis.set_ylim(bottom=0)
        memory.set_xlabel("modules K")
        memory.set_xticks(sorted({row["modules"] for row in rows}))
    axes[0, 0].set_ylabel("time / end to end")
    axes[1, 0].set_ylabel("memory / end to end")
    axes[0, 0].legend(fontsize="small")
    _save(figure, file)


def over_processes(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the seconds of a pass over the number of ranks."""
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    axis: Axes = figure.subplots()
    ranks = [row["ranks"] for row in rows]
    for name, style in (("pipelined", "C0o-"), ("forecast", "C0+--"), ("ideal", "C7x:"), ("1F1B", "C3^-")):
        label = {"ideal": "n + K - 1 steps", "1F1B": "end to end, 1F1B"}.get(name, name)
        axis.plot(ranks, [row[name] for row in rows], style, label=label)
    axis.set(xlabel="processes, as many modules", ylabel="seconds of a pass", xticks=ranks)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize="small")
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    """Write a figure with the same bytes for the same data, and its letters as text."""
    with mpl.rc_context({"svg.hashsalt": "locc", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("--bench", type=Path, default=Path("out/bench.json"), help="of benchmarks.run --json")
    parser.add_argument(
        "--pipeline", type=Path, default=Path("out/pipeline.json"), help="of benchmarks.pipeline --json"
    )
    parser.add_argument("--to", type=Path, default=Path("docs"), help="a folder")
    given = parser.parse_args(argv)
    over_modules(json.loads(given.bench.read_text())["rows"], given.to / "bench.svg")
    over_processes(json.loads(given.pipeline.read_text()), given.to / "processes.svg")


if __name__ == "__main__":
    main()
