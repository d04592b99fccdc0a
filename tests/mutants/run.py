"""Judge the mutants of every program: `make mutants`, or `python -m mutants.run` with tests/ on the path."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from rich.console import Console

from . import lowering
from .judge import Judge, Mutant
from .lowering import Verdict
from .report import Result, show, show_lowering
from .subjects import pairs, subject

Work = tuple[str, str, int | None]
Found = tuple[list[Mutant], int, list[str]] | None


def work(task: Work) -> Found:
    """Judge the mutants of one method on one shape; None where the method refuses the shape."""
    method, shape, each = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = subject(method, shape)
    if found is None:
        return None
    judge = Judge(found)
    verdicts = [judge.judge(*name) for name in judge.names(each)]
    return [v for v in verdicts if v is not None], judge.count.circular, judge.count.broken


def collect(tasks: list[Work], workers: int, console: Console | None = None) -> Result:
    """Judge in several processes; the result does not depend on how many."""
    result = Result()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for (method, shape, _), found in zip(tasks, pool.imap(work, tasks), strict=True):
            if found is None:
                continue
            mutants, circular, broken = found
            result.programs += 1
            result.mutants += mutants
            result.circular += circular
            result.broken += Counter(broken)
            if console is not None:
                lost = sum(m.survives for m in mutants)
                console.print(f"{method} / {shape}: {len(mutants)} mutants, {lost} survive", highlight=False)
        pool.close()
        pool.join()
    return result


def lower(tasks: list[Work], workers: int) -> list[Verdict]:
    """Judge the mutants of the lowering, in several processes."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return [verdict for verdicts in pool.imap(lowering.work, tasks) for verdict in verdicts]


def main() -> int:
    """Run, print and return 1 if a mutant survives or a valid graph that trains the same is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=1, help="sites of a rewriting operator; 0 for all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--method", action="append", help="only this method; may be given again")
    parser.add_argument("--shape", action="append", help="only this shape; may be given again")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console(width=max(120, Console().width))

    def chosen(found: Iterable[tuple[str, str]], each: int | None) -> list[Work]:
        methods, shapes = given.method, given.shape
        return [(m, s, each) for m, s in found if m in (methods or [m]) and s in (shapes or [s])]

    started = time.perf_counter()
    result = collect(chosen(pairs(), given.each or None), given.workers, console)
    show(result, console)
    lowered = lower(chosen(lowering.programs(), None), given.workers)
    show_lowering(lowered, console)
    console.print(f"{time.perf_counter() - started:.0f} s with {given.workers} processes", highlight=False)
    failed = result.survivors or result.false_alarms or any(v.survives for v in lowered)
    return 1 if failed or not (result.mutants or lowered) else 0


if __name__ == "__main__":
    sys.exit(main())
