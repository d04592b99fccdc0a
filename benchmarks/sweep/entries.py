"""What a model of the sweep is, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EXPORT = "onnx"
"""Stands in a record where a method does, for the export of the model that was just trained."""

Splits = int | str


@dataclass(frozen=True)
class Sample:
    """A model with random weights, and a batch of two for it."""

    model: Any
    inputs: Any
    target: Any = None
    loss: Any = "cross_entropy"


class AbsentError(Exception):
    """The installed libraries do not have the model."""


@dataclass(frozen=True)
class Entry:
    """One model of one family.

    Attributes:
        library: where it comes from.
        family: what its library calls the family.
        name: of the model itself.
        find: imports what the model is made of, and returns a function that makes it; it raises
            `AbsentError` where the library has no such model.
        glob: the splits that a user of this family would name, if there is a natural choice; alternatives,
            for versions of the library that name them otherwise, have a bar between them.
        weight: of one trial, roughly, in seconds; the heaviest go first.
    """

    library: str
    family: str
    name: str
    find: Callable[[], Callable[[], Sample]]
    glob: str | None = None
    weight: float = 2.0

    @property
    def key(self) -> str:
        """Library and model, as `--only` matches them."""
        return f"{self.library}/{self.name}"


@dataclass(frozen=True)
class Record:
    """The outcome of one method on one model, a line of the file of results.

    Attributes:
        outcome: "ok"; "refused" (locc says why not); "error" (anything else was raised, or a number is not
            finite); "time" or "memory" (over the limit); "crash" (the process ended); "broken" (the model
            itself does not train here); "absent".
        stage: what was under way: "make", "compile", "step" or "export".
        text: the message.
        facts: what was measured: "parameters", "modules", seconds by stage.
    """

    key: str
    family: str
    method: str
    splits: Splits
    outcome: str
    stage: str = ""
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def trial(self) -> tuple[str, str, Splits]:
        """What was tried."""
        return self.key, self.method, self.splits


class Results:
    """A JSON-lines file: a header with versions and command for each run, and a line for each outcome."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: list[dict[str, Any]] = []
        self.records: dict[tuple[str, str, Splits], Record] = {}
        for line in _whole_lines(path):
            if "versions" in line:
                self.headers.append(line)
            else:
                record = Record(**line)
                self.records[record.trial] = record

    def begin(self, versions: dict[str, str], command: str) -> None:
        """Note what runs now.

        Raises:
            ValueError: the file holds results of other versions.
        """
        if self.headers and self.headers[0]["versions"] != versions:
            raise ValueError(
                f"{self.path} holds results of {self.headers[0]['versions']}, and this is {versions}; "
                "give another file"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"versions": versions, "command": command}
        if header not in self.headers:
            self.headers.append(header)
            self._append(header)

    def add(self, records: Iterable[Record]) -> None:
        """Keep outcomes, in the file at once."""
        for record in records:
            self.records[record.trial] = record
            self._append(asdict(record))

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file, without a last one that was cut off; the file is mended."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    yield from map(json.loads, whole.splitlines())
