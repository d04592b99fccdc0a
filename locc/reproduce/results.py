"""The file of results: a line of JSON for each training that is over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """What became of one entry with one seed.

    Attributes:
        entry: its id.
        budget: the budget's name.
        trained: the budget in words; a result of another one is not taken for this.
        seed: of the weights, the order of the data, and the method's own numbers.
        value: percent correct of the test, or its mean loss; None if there is none.
        error: why not: the method is not defined here, or the training broke off.
        seconds: processor time in user mode.
        date: the day it was measured.
        hardware: on what.
    """

    entry: str
    budget: str
    trained: str
    seed: int
    value: float | None
    error: str = ""
    seconds: float = 0.0
    date: str = ""
    hardware: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What was asked."""
        return self.entry, self.budget, self.trained, self.seed


class Results:
    """The results in a file, by what was asked; the last line of a kind counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = {result.key: result for result in (Result(**line) for line in whole_lines(path))}

    def add(self, result: Result) -> None:
        """Keep a result, in the file at once."""
        self.found[result.key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def of(self, entry: str, budget: str, trained: str) -> list[Result]:
        """Return the results of all seeds."""
        return [r for r in self.found.values() if r.key[:3] == (entry, budget, trained)]


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file, without a last one that was cut off; the file is mended."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    yield from map(json.loads, whole.splitlines())
