"""Runs each trial in a process of its own, with a limit on time and memory.

A trial is one model with all its methods: what PyTorch sets up in a process's first compilation serves all.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from benchmarks.sweep.entries import EXPORT, AbsentError, Entry, Record, Sample, Splits

Attempt = Callable[[Entry, Callable[[], Sample], str, Splits, bool], Iterator[Record]]

_NO_MEMORY = 77
"""The exit code of a process that could not even say so."""


@dataclass(frozen=True)
class Trial:
    """Methods on one model, each on a new one; with `export`, the first one's is exported afterwards."""

    entry: Entry
    methods: Sequence[str]
    splits: Splits
    export: bool = False

    def record(self, outcome: str, text: str, what: str) -> Record:
        """Return an outcome of it that is known here."""
        return Record(self.entry.key, self.entry.family, what, self.splits, outcome, "", text)


@dataclass(frozen=True)
class Limits:
    """Seconds of a method (and again of its export), memory in GiB, and seconds for starting new methods."""

    seconds: float = 25.0
    memory: float = 6.0
    budget: float = float("inf")


@dataclass
class _Running:
    trial: Trial
    process: BaseProcess
    pipe: Connection
    deadline: float
    left: list[str]
    began: bool = False

    def settle(self, record: Record) -> list[Record]:
        """Strike what has its outcome off what is left, and return all that is known by it."""
        self.began = True
        self.left.remove(record.method)
        if record.outcome != "ok" and EXPORT in self.left:
            self.left.remove(EXPORT)
        if record.outcome != "broken":  # that is said of the model
            return [record]
        rest, self.left = self.left, []
        return [record, *(replace(record, method=method) for method in rest)]


def run(trials: Iterable[Trial], attempt: Attempt, workers: int, limits: Limits) -> Iterator[list[Record]]:
    """Yield the records of each trial as they come, until all are done or the budget is.

    Where a process ends before its methods do, a new one goes on with those after the one that ended it.

    Processes are forked: what this one has imported costs them nothing. A model that is absent is found here,
    by its import alone.
    """
    waiting, again, running = iter(trials), list[Trial](), list[_Running]()
    stop = time.monotonic() + limits.budget
    found: dict[str, Callable[[], Sample] | Exception] = {}
    try:
        while True:
            while len(running) < workers and time.monotonic() < stop:
                trial = again.pop() if again else next(waiting, None)
                if trial is None:
                    break
                make = found.get(trial.entry.key) or found.setdefault(trial.entry.key, _find(trial.entry))
                if isinstance(make, Exception):
                    outcome = "absent" if isinstance(make, AbsentError) else "error"
                    yield [trial.record(outcome, f"{type(make).__name__}: {make}", m) for m in trial.methods]
                else:
                    running.append(_start(trial, make, attempt, limits))
            if not running:
                return
            nearest = min(r.deadline for r in running)
            wait([r.pipe for r in running], max(0.0, nearest - time.monotonic()))
            for one in list(running):
                records, done = _look(one, limits)
                if done or (records and time.monotonic() >= stop):
                    _end(one)
                    running.remove(one)
                    if one.left:
                        again.append(replace(one.trial, methods=one.left, export=False))
                if records:
                    yield records
    finally:
        for one in running:
            _end(one)


def _find(entry: Entry) -> Callable[[], Sample] | Exception:
    try:
        return entry.find()
    except Exception as error:
        return error


def _start(trial: Trial, make: Callable[[], Sample], attempt: Attempt, limits: Limits) -> _Running:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, trial, make, attempt, limits), daemon=True)
    process.start()
    theirs.close()
    first, *others = trial.methods
    left = [first, *([EXPORT] if trial.export else []), *others]
    return _Running(trial, process, mine, time.monotonic() + limits.seconds, left)


def _work(
    pipe: Connection, trial: Trial, make: Callable[[], Sample], attempt: Attempt, limits: Limits
) -> None:
    """Run one trial, in its own process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What this process has so far counts as well, so the limit is on what the trial adds.
    used = _data_bytes()
    limit = used + int(limits.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    void = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(void, 1)
    os.dup2(void, 2)
    try:
        for method in trial.methods:
            for record in attempt(
                trial.entry, make, method, trial.splits, trial.export and method == trial.methods[0]
            ):
                pipe.send(record)
                if record.outcome in ("memory", "broken"):
                    return
            gc.collect()
    except MemoryError:
        os._exit(_NO_MEMORY)


def _data_bytes() -> int:
    """Return the size of this process's data, as the system counts it for its limit."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024
    except (OSError, StopIteration):
        return 0


def _look(one: _Running, limits: Limits) -> tuple[list[Record], bool]:
    """Return what a trial has sent or what ended it, and whether its process is over."""
    records: list[Record] = []
    try:
        while one.left and one.pipe.poll():
            records += one.settle(one.pipe.recv())
            one.deadline = time.monotonic() + limits.seconds
    except EOFError:
        one.process.join()
        code = one.process.exitcode
        if code or not one.began:
            outcome = "memory" if code == _NO_MEMORY else "crash"
            records += one.settle(one.trial.record(outcome, f"exit code {code}", one.left[0]))
        return records, True
    if one.left and time.monotonic() >= one.deadline:
        records += one.settle(one.trial.record("time", f"more than {limits.seconds:g} s", one.left[0]))
        return records, True
    return records, not one.left


def _end(one: _Running) -> None:
    one.process.kill()
    one.process.join()
    one.pipe.close()
