"""Runs each trial in a process of its own, with a limit on its time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from benchmarks.sweep.entries import EXPORT, AbsentError, Entry, Record, Sample, Splits

Attempt = Callable[[Entry, Callable[[], Sample], str, Splits, bool], Iterator[Record]]


@dataclass(frozen=True)
class Trial:
    """One method on one model; with `export`, the model is exported afterwards."""

    entry: Entry
    method: str
    splits: Splits
    export: bool = False

    def record(self, outcome: str, text: str, what: str = "") -> Record:
        """Return an outcome of it that is known here."""
        entry = self.entry
        return Record(entry.key, entry.family, what or self.method, self.splits, outcome, "", text)


@dataclass(frozen=True)
class Limits:
    """Seconds of a trial (and again of its export), of memory in GiB, and seconds for starting new trials."""

    seconds: float = 25.0
    memory: float = 6.0
    budget: float = float("inf")


@dataclass
class _Running:
    trial: Trial
    process: BaseProcess
    pipe: Connection
    deadline: float
    left: list[str] = field(default_factory=list)


def run(trials: Iterable[Trial], attempt: Attempt, workers: int, limits: Limits) -> Iterator[list[Record]]:
    """Yield the records of each trial as they come, until all are done or the budget is.

    Processes are forked: what this one has imported costs them nothing. A model that is absent is found here,
    by its import alone.
    """
    waiting, running = iter(trials), list[_Running]()
    stop = time.monotonic() + limits.budget
    found: dict[str, Callable[[], Sample] | Exception] = {}
    try:
        while True:
            while len(running) < workers and time.monotonic() < stop:
                trial = next(waiting, None)
                if trial is None:
                    break
                make = found.get(trial.entry.key) or found.setdefault(trial.entry.key, _find(trial.entry))
                if isinstance(make, Exception):
                    outcome = "absent" if isinstance(make, AbsentError) else "error"
                    yield [trial.record(outcome, f"{type(make).__name__}: {make}")]
                else:
                    running.append(_start(trial, make, attempt, limits))
            if not running:
                return
            nearest = min(r.deadline for r in running)
            wait([r.pipe for r in running], max(0.0, nearest - time.monotonic()))
            for one in list(running):
                records, done = _look(one, limits)
                if records:
                    yield records
                if done:
                    running.remove(one)
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
    left = [trial.method, *([EXPORT] if trial.export else [])]
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
        for record in attempt(trial.entry, make, trial.method, trial.splits, trial.export):
            pipe.send(record)
    except MemoryError:
        pipe.send(trial.record("memory", "MemoryError"))


def _data_bytes() -> int:
    """Return the size of this process's data, as the system counts it for its limit."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024
    except (OSError, StopIteration):
        return 0


def _look(one: _Running, limits: Limits) -> tuple[list[Record], bool]:
    """Return what a trial has sent, and whether it is over."""
    records: list[Record] = []
    try:
        while one.pipe.poll():
            record = one.pipe.recv()
            records.append(record)
            one.left.remove(record.method)
            one.deadline = time.monotonic() + limits.seconds
            if record.outcome != "ok":
                one.left.clear()
    except EOFError:
        one.process.join()
        if one.left and one.process.exitcode:
            records.append(one.trial.record("crash", f"exit code {one.process.exitcode}", one.left[0]))
        _end(one)
        return records, True
    if one.left and time.monotonic() < one.deadline:
        return records, False
    _end(one)
    if not one.left:
        return records, True
    return [*records, one.trial.record("time", f"more than {limits.seconds:g} s", one.left[0])], True


def _end(one: _Running) -> None:
    one.process.kill()
    one.process.join()
    one.pipe.close()
