"""What a run over many mutants found, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from . import lowering
from .judge import ACCEPTED, CHECKS, FACTS, HASH, KILLED, NOTHING, TENSOR, Mutant
from .lowering import Verdict
from .oracle import Truth


@dataclass
class Result:
    """Every verdict, and what was not judged.

    Attributes:
        mutants: the verdicts.
        circular: mutants whose values have no valid order, so that they are no program.
        broken: mutants that no machine can run (shapes that do not fit), by error.
        programs: number of clean programs.
    """

    mutants: list[Mutant] = field(default_factory=list)
    circular: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    programs: int = 0

    def of(self, truth: Truth) -> list[Mutant]:
        """Return the mutants that really are so."""
        return [m for m in self.mutants if m.truth is truth]

    @property
    def survivors(self) -> list[Mutant]:
        """What the verifier let pass and must not."""
        return [m for m in self.mutants if m.survives]

    @property
    def false_alarms(self) -> list[Mutant]:
        """What the verifier refused and must not."""
        return [m for m in self.mutants if m.false_alarm]


def show(result: Result, console: Console) -> None:
    """Print the tables, the counts and the survivors."""
    console.print(_table("mutants by operator", result.mutants, lambda m: m.operator))
    console.print(_alone(result.of(Truth.LEAK)))
    _counts(result, console)
    for kind, held in (("SURVIVOR", result.survivors), ("FALSE ALARM", result.false_alarms)):
        for m in held:
            console.print(f"{kind} {m}", markup=False, highlight=False, soft_wrap=True)


_COLUMNS: dict[str, Callable[[Mutant], bool]] = {
    "leak": lambda m: m.truth is Truth.LEAK,
    "killed": lambda m: m.truth is Truth.LEAK and m.outcome == KILLED,
    "changed": lambda m: m.truth is Truth.CHANGED,
    "refused": lambda m: m.truth is Truth.CHANGED and m.refused,
    "facts tell": lambda m: m.truth is Truth.CHANGED and m.outcome == ACCEPTED and m.shown == FACTS,
    "hash tells": lambda m: m.truth is Truth.CHANGED and m.outcome == ACCEPTED and m.shown == HASH,
    "same": lambda m: m.truth is Truth.SAME,
    "refused ": lambda m: m.truth is Truth.SAME and m.refused,
    "survivors": lambda m: m.survives,
}


def show_lowering(verdicts: list[Verdict], console: Console) -> None:
    """Print what became of the mutants of the lowering, and the survivors."""
    console.print(_table("mutants of the lowering", verdicts, lambda v: v.operator, lowering.COLUMNS))
    for v in (v for v in verdicts if v.survives):
        where = f"{v.method} / {v.shape} / {v.operator} / {v.where}"
        console.print(f"SURVIVOR {where}", markup=False, highlight=False, soft_wrap=True)


def _table(
    title: str,
    mutants: Sequence[Any],
    key: Callable[[Any], str],
    columns: Mapping[str, Callable[[Any], bool]] = _COLUMNS,
) -> Table:
    table = Table(title=title)
    table.add_column("")
    for name in ("all", *columns):
        table.add_column(name, justify="right")
    groups: dict[str, list[Any]] = {}
    for m in mutants:
        groups.setdefault(key(m), []).append(m)
    for name, held in [*groups.items(), ("all", list(mutants))]:
        table.add_row(name, str(len(held)), *(_count(held, test) for test in columns.values()))
    return table


def _count(mutants: Iterable[Any], test: Callable[[Any], bool]) -> str:
    return str(sum(1 for m in mutants if test(m)) or "")


_ALONE: dict[str, Callable[[Mutant], bool]] = {
    **{name: lambda m, name=name: name in m.alone for name in CHECKS},  # type: ignore[misc]
    "one alone": lambda m: len(m.alone) == 1,
    "none": lambda m: not m.alone,
    "invariants": lambda m: m.invalid,
}


def _alone(leaks: Sequence[Mutant]) -> Table:
    """How many leaks each check finds without the others, and the invariants that hold after a pass."""
    table = Table(title="leaks that each check finds when it runs alone")
    table.add_column("")
    for name in ("leaks", *_ALONE):
        table.add_column(name, justify="right")
    for operator in dict.fromkeys(m.operator for m in leaks):
        held = [m for m in leaks if m.operator == operator]
        table.add_row(operator, str(len(held)), *(_count(held, test) for test in _ALONE.values()))
    shares = (100 * sum(map(test, leaks)) / max(len(leaks), 1) for test in _ALONE.values())
    table.add_row("all", str(len(leaks)), *(f"{share:.1f} %" for share in shares))
    return table


def _counts(result: Result, console: Console) -> None:
    leaks, changed = result.of(Truth.LEAK), result.of(Truth.CHANGED)
    killed = [m for m in leaks if m.outcome == KILLED]
    exact = sum(m.named == TENSOR for m in killed)
    doubtful = [m for m in result.mutants if m.outcome == ACCEPTED and m.message]
    by = Counter(m.shown for m in changed if m.outcome == ACCEPTED)
    lines = [
        f"{len(result.mutants)} mutants of {result.programs} programs; beside them {result.circular} without "
        f"a valid order, and {result.broken.total()} that cannot run",
        f"leaks: {len(killed)} of {len(leaks)} killed ({100 * len(killed) / max(len(leaks), 1):.2f} %); "
        f"{exact} kills name the tensor that would be moved, {len(killed) - exact} another value",
        f"changed: {by.total()} of {len(changed)} accepted; {by[FACTS]} certificates differ in a fact, "
        f"{by[HASH]} in the hash alone, {by[NOTHING]} in nothing",
        f"accepted, as the certificate says with an incomplete check: {len(doubtful)}",
        f"false alarms (a valid graph called not local that trains the same): {len(result.false_alarms)}",
        f"survivors: {len(result.survivors)}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    for m in doubtful[:10]:
        console.print(f"  {m}", markup=False, highlight=False, soft_wrap=True)
    for error, count in result.broken.most_common(5):
        console.print(f"  cannot run, {count}: {error}", markup=False, highlight=False)
