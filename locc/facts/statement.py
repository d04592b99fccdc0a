"""What a certificate states, as data."""

from __future__ import annotations

from dataclasses import dataclass

from locc.errors import LoccError
from locc.facts.records import CheckRun, Memory, OwnerFacts, TableRow
from locc.facts.traffic import Flow
from locc.ir import Coupling

VERSION = 6


@dataclass(frozen=True)
class Statement:
    """What was proved of a program, and what follows from its graph: the data of a `Certificate`."""

    method: str
    loss: str
    training: str
    phases: tuple[str, ...]
    verdict: str
    reasons: tuple[str, ...]
    owners: tuple[OwnerFacts, ...]
    flows: tuple[Flow, ...]
    pipeline_exact: bool
    pipeline_reason: str
    critical_path: tuple[str, ...]
    table: TableRow
    gradients: tuple[tuple[str, str], ...]
    couplings: tuple[Coupling, ...]
    warnings: tuple[str, ...]
    checks: tuple[CheckRun, ...]
    memory: Memory | None
    graph_hash: str
    version: int = VERSION

    @property
    def complete(self) -> bool:
        """Whether every check ran to its end."""
        return all(check.status == "held" for check in self.checks)

    @property
    def seconds(self) -> float | None:
        """What the checks took together; None for a certificate that was read from a file."""
        taken = [check.seconds for check in self.checks if check.seconds is not None]
        return sum(taken) if taken else None

    def owner(self, name: str) -> OwnerFacts:
        """Return the facts on one owner.

        Raises:
            LoccError: there is no such owner.
        """
        for owner in self.owners:
            if owner.name == name:
                return owner
        raise LoccError(
            f"the certificate knows no module '{name}'; it has " + ", ".join(o.name for o in self.owners)
        )

    def entering(self, name: str) -> tuple[Flow, ...]:
        """Return what enters an owner."""
        return tuple(f for f in self.flows if f.consumer == name)

    def leaving(self, name: str) -> tuple[Flow, ...]:
        """Return what leaves an owner."""
        return tuple(f for f in self.flows if f.producer == name)
