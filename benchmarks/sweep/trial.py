"""One method on one model: compile, take a step, perhaps export."""

from __future__ import annotations

import fnmatch
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import locc
from benchmarks.sweep.entries import EXPORT, Entry, Record, Sample, Splits
from locc.errors import GraphError

_MEMORY = ("can't allocate memory", "not enough memory", "MemoryError", "std::bad_alloc")


def attempt(
    entry: Entry, make: Callable[[], Sample], method: str, splits: Splits, export: bool
) -> Iterator[Record]:
    """Yield what became of the method, and of the export where that is asked for."""
    facts: dict[str, Any] = {}
    stage = "make"

    def record(outcome: str, text: str = "", what: str = method) -> Record:
        return Record(entry.key, entry.family, what, splits, outcome, stage, text, facts)

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        with _timed(facts, stage):
            sample = make()
        facts["parameters"] = sum(p.numel() for p in sample.model.parameters())
    except Exception as error:
        yield record(*_outcome("broken", error))
        return
    stage = "compile"
    chosen = _present(splits, sample.model) if isinstance(splits, str) else splits
    if not chosen:
        yield record("absent", "no such submodules")
        return
    try:
        with _timed(facts, stage):
            # What one method has shown of a capture serves the others that look at the same layers.
            program = locc.compile(
                sample.model,
                method,
                chosen,
                loss=sample.loss,
                example_inputs=sample.inputs,
                seed=0,
                cache=True,
            )
        facts["modules"] = len(program.module_programs)
        stage = "step"
        with _timed(facts, stage):
            loss = float(program.step(sample.inputs, sample.target).loss)
    except Exception as error:
        outcome, text = _outcome(_refused(error), error)
        broken = (outcome == "error" or "the model itself fails" in text) and _broken(make)
        yield record("broken", broken) if broken else record(outcome, text)
        return
    yield record(
        "ok" if math.isfinite(loss) else "error", "" if math.isfinite(loss) else f"the loss is {loss}"
    )
    if not export:
        return
    try:
        stage = "export"
        with tempfile.TemporaryDirectory() as folder, _timed(facts, stage):
            program.export_onnx(Path(folder) / "model.onnx")
        yield record("ok", what=EXPORT)
    except Exception as error:
        yield record(*_outcome(_refused(error), error), what=EXPORT)


class _timed:  # noqa: N801 (reads as a verb)
    """Adds the seconds that a block takes to `facts`."""

    def __init__(self, facts: dict[str, Any], stage: str) -> None:
        self.facts, self.stage = facts, stage

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.facts[self.stage] = round(time.perf_counter() - self.started, 3)


def _present(globs: str, model: Any) -> str:
    """Return the first of the alternatives that matches a submodule, or ''."""
    names = [name for name, _ in model.named_modules()]

    def matches(glob: str) -> bool:
        return any(n.count(".") == glob.count(".") and fnmatch.fnmatchcase(n, glob) for n in names)

    return next(filter(matches, globs.split("|")), "")


def _outcome(otherwise: str, error: Exception) -> tuple[str, str]:
    kind, message = type(error).__name__, str(error).strip()
    text = f"{kind}: {message}"
    return ("memory" if any(m in text for m in _MEMORY) else otherwise), text[:4000]


def _refused(error: Exception) -> str:
    """Return what an error is: an invalid graph is a mistake of ours, whatever it says."""
    return "refused" if isinstance(error, locc.LoccError) and not isinstance(error, GraphError) else "error"


def _broken(make: Callable[[], Sample]) -> str:
    """Return the error of the model itself, trained end to end without locc, or ''."""
    torch.manual_seed(0)
    try:
        sample = make()
        output = _call(sample.model.train(), sample.inputs)
        if callable(sample.loss):
            sample.loss(output, sample.target).backward()
        elif sample.loss == "model":
            output["loss"].backward()
        _call(sample.model.eval(), sample.inputs)
        return ""
    except Exception as error:
        return _outcome("", error)[1]


def _call(model: Any, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
