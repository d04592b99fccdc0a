"""What the checks have seen, and the certificate that says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from locc.errors import LoccError
from locc.facts import (
    NOT,
    Certificate,
    CheckRun,
    Locking,
    Memory,
    ObjectiveFacts,
    OwnerFacts,
    TableRow,
    derive,
    graph_hash,
)
from locc.facts.critical import critical_path
from locc.facts.locking import locking, modularity
from locc.facts.traffic import auxiliaries, couplings, flows, pipeline_exact
from locc.ir import TrainingGraph, assign
from locc.ir.captured import strip
from locc.losses import Loss
from locc.proof import sentinel, static, walk
from locc.proof.experiment.batch import Batch
from locc.proof.findings import REACHABILITY, SENTINEL, WALK


@dataclass
class Evidence:
    """What the checks have seen so far."""

    checks: list[CheckRun] = field(default_factory=list)
    training: str = ""
    warnings: list[str] = field(default_factory=list)
    walk: walk.Walk | None = None
    sentinel: sentinel.Sentinel | None = None
    memory: Memory | None = None
    started: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure what runs inside."""
        self.started = time.perf_counter()
        yield

    def note(self, name: str, detail: str, status: str = "held") -> None:
        """Record what became of a check."""
        seconds = time.perf_counter() - self.started
        self.checks.append(CheckRun(name, status, detail, seconds))


def certificate(ir: TrainingGraph, name: str, batch: Batch, seen: Evidence) -> Certificate:
    """Return the certificate: what follows from the graph, and what the checks have seen."""
    derived = derive(ir, batch.size, batch.target)
    locks = {owner: locking(ir, derived, owner) for owner in ir.owners}
    verdict, reasons = modularity(ir, derived, locks)
    traffic = flows(ir, derived)
    coupled = couplings(ir, seen.sentinel.written if seen.sentinel is not None else None)
    exact, why = pipeline_exact(traffic, coupled)
    helpers = auxiliaries(ir)
    shown = static.reached(ir)
    depth = max((lock.chain for lock in locks.values()), default=0)
    backward = (
        "end to end" if verdict == NOT else "none" if depth == 0 else f"{depth} hop" + "s" * (depth > 1)
    )
    table = TableRow(bool(helpers), any(lock.update for lock in locks.values()), backward)
    doubts = [
        f"whether '{node}' is linear in a gradient could not be tried, and is assumed"
        for node in derived.doubtful
    ]
    return Certificate(
        method=name,
        loss=Loss.of(ir.loss_function).reading(),
        training=seen.training,
        phases=tuple(map(str, ir.phases)),
        verdict=verdict,
        reasons=reasons,
        owners=tuple(
            _owner(ir, owner, locks[owner], helpers.get(owner, []), shown, seen) for owner in _in_order(ir)
        ),
        flows=tuple(traffic),
        pipeline_exact=exact,
        pipeline_reason=why,
        critical_path=tuple(_critical(ir)),
        table=table,
        gradients=tuple(_gradients(ir, derived.layered, seen)),
        couplings=tuple(coupled),
        warnings=tuple(dict.fromkeys([*_untrained(ir, seen), *seen.warnings, *doubts])),
        checks=tuple(seen.checks),
        memory=seen.memory,
        graph_hash=graph_hash(ir),
    )


def _in_order(ir: TrainingGraph) -> list[str]:
    return [o.name for o in sorted(ir.owners.values(), key=lambda o: (o.index, o.auxiliary))]


def _critical(ir: TrainingGraph) -> list[str]:
    try:
        return critical_path(ir)
    except LoccError:  # phases that cannot share a step: the longest of them counts
        if not ir.phases:
            raise
        paths = [critical_path(ir, frozenset(phase.trains)) for phase in ir.phases]
        return max(paths, key=len)


def _gradients(ir: TrainingGraph, layered: set[Any], seen: Evidence) -> list[tuple[str, str]]:
    found = []
    for node in ir.gradients():
        weighted = seen.walk.weighted.get(node.name) if seen.walk is not None else None
        if node not in layered:
            how = "passes through no layer"
        elif weighted is None:
            how = f"passes through the layers of '{node.meta['owner']}'"
        else:
            by = "their trained weights" if weighted else "fixed matrices, not their trained weights"
            how = f"passes through the layers of '{node.meta['owner']}', by {by}"
        found.append((node.name, how))
    return found


def _owner(
    ir: TrainingGraph,
    owner: str,
    lock: Locking,
    helpers: list[str],
    shown: dict[str, list[str]],
    seen: Evidence,
) -> OwnerFacts:
    parameters = {strip(path): p for path, p in ir.parameters(owner).items()}
    objectives = []
    for node in ir.objectives(owner):
        label = str(node.meta["objective"])
        by = [REACHABILITY]
        reaches = set(shown[label])
        if seen.walk is not None and label in seen.walk.reached:
            by.append(WALK)
            reaches = seen.walk.reached[label]
        if seen.sentinel is not None and label in seen.sentinel.received:
            by.append(SENTINEL)
        objectives.append(ObjectiveFacts(label, tuple(sorted(reaches)), tuple(by)))
    return OwnerFacts(
        name=owner,
        index=ir.owners[owner].index,
        auxiliary=ir.owners[owner].auxiliary,
        frozen=ir.frozen(owner),
        parameters=tuple(parameters),
        count=sum(p.numel() for p in parameters.values()),
        networks=tuple(helpers),
        objectives=tuple(objectives),
        forward_locked=lock.forward,
        update_waits_for=lock.update,
        backward_waits_for=lock.backward,
        backward_depth=lock.depth,
        depends_on=lock.values,
        trains_on_gradient=lock.trains_on,
        gradient_hops=lock.hops,
        peak_memory=seen.memory.of(owner) if seen.memory is not None else None,
    )


def _untrained(ir: TrainingGraph, seen: Evidence) -> list[str]:
    """Name the parameters that no objective reaches, as far as the strongest check can tell."""
    reached = seen.walk.reached if seen.walk is not None else static.reached(ir)
    trained = {path for paths in reached.values() for path in paths}
    states = [n.args[0] for n in ir.graph.nodes if n.target is assign]
    trained |= {strip(str(state.target)) for state in states if isinstance(state, fx.Node)}
    missing = static.untrained(ir, trained)
    if not missing:
        return []
    shown = ", ".join(f"'{p}'" for p in missing[:12]) + (
        f" and {len(missing) - 12} more" if len(missing) > 12 else ""
    )
    return [f"no objective reaches {len(missing)} trainable parameter(s), which stay as they are: {shown}"]
