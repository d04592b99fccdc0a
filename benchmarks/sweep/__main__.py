"""The command line of the sweep."""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from benchmarks.sweep.entries import EXPORT, Entry, Record, Results
from benchmarks.sweep.pool import Limits, Trial, run
from benchmarks.sweep.report import report

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NAMED = "dgl"
"""The method that is tried with named splits as well."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description="Compile every method on one model of each family of torchvision, timm and transformers.",
    )
    parser.add_argument("results", nargs="?", type=Path, default=Path("out/sweep.jsonl"), metavar="FILE")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes at a time")
    parser.add_argument(
        "--only", action="append", metavar="GLOB", help="models, such as 'timm/*'; repeatable"
    )
    parser.add_argument("--lightest", type=int, metavar="N", help="the N lightest of these models")
    parser.add_argument("--known", action="store_true", help="only models of which FILE has outcomes")
    parser.add_argument("--methods", metavar="A,B", help="all by default")
    parser.add_argument("--splits", type=int, default=4, help="modules of balanced cost")
    parser.add_argument("--without-named", action="store_true", help="leave out the named splits")
    parser.add_argument("--without-onnx", action="store_true", help="leave out the exports")
    parser.add_argument("--limit", type=float, default=25.0, metavar="SECONDS", help="of one method")
    parser.add_argument("--memory", type=float, default=6.0, metavar="GIB", help="of one process")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of the run")
    parser.add_argument("--retry", metavar="OUTCOMES", help="try these again, such as 'time,error'")
    parser.add_argument("--report", action="store_true", help="write the page only")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page")
    return parser.parse_args(argv)


def trials(options: argparse.Namespace, entries: Sequence[Entry], methods: Sequence[str]) -> Iterator[Trial]:
    """Yield what is asked for, the heaviest model first; the first of its methods exports as well."""
    ordered = sorted(methods, key=lambda m: (m != "bp", m))
    for entry in sorted(entries, key=lambda e: -e.weight):
        yield Trial(entry, ordered, options.splits, not options.without_onnx)
        if NAMED in methods and entry.glob and not options.without_named:
            yield Trial(entry, [NAMED], entry.glob)


def missing(trial: Trial, results: Results, retry: Sequence[str]) -> Trial | None:
    """Return what of a trial has yet to be run, or None."""

    def lacks(what: str) -> bool:
        done = results.records.get((trial.entry.key, what, trial.splits))
        return done is None or done.outcome in retry

    first, *others = trial.methods
    done = results.records.get((trial.entry.key, first, trial.splits))
    export = trial.export and (lacks(first) or (done is not None and done.outcome == "ok" and lacks(EXPORT)))
    left = [*([first] if export or lacks(first) else []), *filter(lacks, others)]
    return replace(trial, methods=left, export=export) if left else None


def versions() -> dict[str, str]:
    """Return the versions that the outcomes depend on."""
    found = {"Python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "transformers", "locc"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep, or what is left of it, and write the page."""
    options = arguments(argv)
    results = Results(options.results)
    if not options.report:
        sweep(options, results)
    if not results.headers:
        raise SystemExit(f"{options.results} holds no results")
    options.page.write_text(report(results))
    print(f"{options.page}: {len(results.records)} outcomes")


def sweep(options: argparse.Namespace, results: Results) -> None:
    """Run what has no outcome yet."""
    started = time.monotonic()
    # One thread a process: the processes are the parallelism. Read when PyTorch and BLAS are imported.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.environ.setdefault("LOCC_CACHE", str(options.results.parent / "captures"))
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import locc
    from benchmarks.sweep.catalogue import entries
    from benchmarks.sweep.trial import attempt

    methods = options.methods.split(",") if options.methods else sorted(locc.methods())
    if unknown := set(methods) - set(locc.methods()):
        raise SystemExit(f"no method {', '.join(unknown)}; there are {', '.join(sorted(locc.methods()))}")
    globs = options.only or ["*"]
    chosen = [e for e in entries() if any(fnmatch.fnmatchcase(e.key, glob) for glob in globs)]
    if options.known:
        known = {key for key, *_ in results.records}
        chosen = [entry for entry in chosen if entry.key in known]
    chosen = sorted(chosen, key=lambda e: e.weight)[: options.lightest]
    retry = (options.retry or "").split(",")
    asked = (missing(t, results, retry) for t in trials(options, chosen, methods))
    left = [trial for trial in asked if trial]
    command = shlex.join(
        ["python", "-m", "benchmarks.sweep", *(sys.argv[1:] if __name__ == "__main__" else [])]
    )
    try:
        results.begin(versions(), command)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{len(chosen)} models, {sum(len(t.methods) for t in left)} outcomes to find", flush=True)
    # Told to end, the run ends its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    limits = Limits(options.limit, options.memory, options.budget - (time.monotonic() - started))
    for records in run(left, attempt, options.workers, limits):
        results.add(records)
        for record in records:
            print(f"{time.monotonic() - started:5.0f} s  {told(record)}", flush=True)


def told(record: Record) -> str:
    """Return an outcome as one line."""
    text = " ".join(record.text.split())[:150]
    seconds = " ".join(f"{k} {v}" for k, v in record.facts.items() if isinstance(v, float))
    return f"{record.key} {record.method} {record.splits} {record.outcome} {text or seconds}"


if __name__ == "__main__":
    main()
