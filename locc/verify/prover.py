"""Runs the checks and writes the certificate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, optim

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
from locc.ir import Inputs, TrainingGraph, assign
from locc.ir.captured import strip
from locc.lower import Plan
from locc.runtime import Compiled, Learner, checked
from locc.snapshot import preserved
from locc.verify import sentinel, static, storage, walk
from locc.verify.experiment.batch import Batch, small_batch, standing_in, whole_batch
from locc.verify.experiment.runner import plans_of
from locc.verify.experiment.worlds import reason
from locc.verify.findings import REACHABILITY, SENTINEL, STORAGE, WALK, refuse
from locc.verify.memory import estimate

_FEW_PARAMETERS = 1 << 24
_FEW_OPERATIONS = 1e10
"""Up to so many parameters, and operations in a small step, the sentinel runs on real tensors."""


@dataclass
class _Evidence:
    """What the checks have seen so far."""

    checks: list[CheckRun] = field(default_factory=list)
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
        self.checks.append(CheckRun(name, status, seconds, detail))


def prove(
    ir: TrainingGraph,
    name: str,
    learners: Mapping[str, Learner],
    inputs: Inputs,
    target: Any = None,
    real: bool | None = None,
) -> Certificate:
    """Run every check on a training graph and return the certificate.

    Args:
        ir: the graph; it, the model and the optimizers are bit for bit as they were afterwards.
        name: the method's id, for the title.
        learners: the optimizer of each owner that trains.
        inputs: example inputs; a small batch is cut from them.
        target: the target of these inputs; without one, a target that the loss accepts is made up.
        real: whether the sentinel runs on real tensors; None: where two small steps cost little.

    Raises:
        LocalityError: a gradient or a state change crosses a module boundary.
    """
    optimizers = {owner: learner.optimizer for owner, learner in learners.items()}
    seen = _Evidence()
    _static(ir, name, learners, seen)
    with preserved(ir.root, values=False):
        if not ir.root.model.training:
            ir.root.train()
        with seen.timed():
            batch = small_batch(ir, inputs, target)
        with standing_in(ir, batch.stand_in):
            plans = plans_of(ir)
            _walk(ir, name, plans, batch, seen)
            operations = _weigh(ir, plans, optimizers, whole_batch(ir, inputs, batch), seen)
            small = _parameters(ir) <= _FEW_PARAMETERS and operations * batch.size <= _FEW_OPERATIONS
            _sentinel(ir, name, plans, optimizers, batch, small if real is None else real, seen)
    if batch.stand_in:
        seen.warnings.append(
            f"{batch.text}: the loss was replaced by a sum over the outputs in the autograd walk and the "
            "sentinel run, so the loss function itself was not examined; call locc.verify(program, x, y) "
            "with a batch of your own"
        )
    return _certificate(ir, name, batch, seen)


def verify(program: Compiled, x: Any = None, y: Any = None, *, real: bool | None = None) -> Certificate:
    """Prove a live program local, from the beginning.

    Args:
        program: a compiled program; its state is bit for bit as it was afterwards.
        x: a batch as `step` takes it; the example inputs of the compilation without one.
        y: its target; made up without one.
        real: True has the sentinel train two steps on real tensors whatever they cost, False on shapes
            alone where the program runs so. The default is True up to 16 million parameters and ten
            billion operations in a small step, and False beyond.

    Returns:
        The certificate, which `program.certificate` returns from then on.

    Raises:
        LocalityError: a gradient or a state change crosses a module boundary.
        LoccError: there is nothing to run the program on.
    """
    checked(program)
    if x is not None:
        program.complete(x)
    ir = program.ir
    inputs = Inputs.of(program.model, x) if x is not None else ir.captured.example
    if inputs is None:
        raise LoccError("the program keeps no example inputs; call locc.verify(program, x) with a batch")
    certificate = prove(ir, program.method, program.built.learners, inputs, y, real)
    program.built.certificate = certificate
    return certificate


def _static(ir: TrainingGraph, name: str, learners: Mapping[str, Learner], seen: _Evidence) -> None:
    optimizers = {owner: learner.optimizer for owner, learner in learners.items()}
    with seen.timed():
        refuse(name, static.check(ir))
        objectives, edges = len(ir.objectives()), sum(len(n.all_input_nodes) for n in ir.graph.nodes)
        seen.note(REACHABILITY, f"{objectives} objectives, {edges} edges")
    with seen.timed():
        refuse(name, storage.check(ir, learners))
        held = sum(len(storage.held_by(o)) for o in optimizers.values())
        seen.note(STORAGE, f"{len(optimizers)} optimizers, {held} parameter tensors, no memory in common")


def _walk(ir: TrainingGraph, name: str, plans: list[Plan], batch: Batch, seen: _Evidence) -> None:
    try:
        found = walk.check(ir, batch, plans)
    except Exception as error:  # the model does not run on a made-up batch: say so, do not guess
        _incomplete(seen, WALK, f"{type(error).__name__}: {error}")
        return
    refuse(name, found.findings)
    seen.walk = found
    text = f"{found.how}, {walk.STEPS} steps, batch of {batch.size}, target: {batch.text}"
    seen.note(WALK, text, "partial" if batch.stand_in else "held")
    seen.warnings += [
        f"a tensor {stranger} requires a gradient and is no parameter of the program; nothing trains it"
        for stranger in found.strangers
    ]


def _weigh(
    ir: TrainingGraph,
    plans: list[Plan],
    optimizers: dict[str, optim.Optimizer],
    batch: Batch,
    seen: _Evidence,
) -> float:
    """Estimate the memory of a step on the example inputs; return its operations for each sample."""
    with seen.timed():
        try:
            seen.memory, operations = estimate(ir, optimizers, batch, plans)
        except Exception as error:
            seen.warnings.append(
                "peak memory could not be estimated, since a step does not run on shapes alone: "
                f"{reason(error)}"
            )
            return 0.0
    return operations / max(batch.size, 1)


def _parameters(ir: TrainingGraph) -> int:
    return sum(t.numel() for t in (*ir.root.parameters(), *ir.root.buffers()))


def _sentinel(
    ir: TrainingGraph,
    name: str,
    plans: list[Plan],
    optimizers: dict[str, optim.Optimizer],
    batch: Batch,
    real: bool,
    seen: _Evidence,
) -> None:
    with seen.timed():
        try:
            found = sentinel.check(ir, optimizers, batch, plans, real)
        except Exception as error:
            _incomplete(seen, SENTINEL, f"{type(error).__name__}: {error}")
            return
        refuse(name, found.findings)
        if found.failure is not None:
            _incomplete(seen, SENTINEL, found.failure)
            return
        seen.sentinel = found
        text = f"{found.how}, {sentinel.STEPS} steps, batch of {batch.size}, state restored"
        seen.note(SENTINEL, text, "partial" if batch.stand_in else "held")


def _incomplete(seen: _Evidence, name: str, reason: str) -> None:
    first = (reason.strip().splitlines() or [""])[0][:240]
    seen.note(name, first, "incomplete")
    seen.warnings.append(
        f"the {name} could not be completed, so it proves nothing: {first}; call "
        "locc.verify(program, x, y) with a batch of your own"
    )


def _certificate(ir: TrainingGraph, name: str, batch: Batch, seen: _Evidence) -> Certificate:
    derived = derive(ir, batch.size, batch.target)
    locks = {owner: locking(ir, derived, owner) for owner in ir.owners}
    verdict, reasons = modularity(ir, derived, locks)
    traffic = flows(ir, derived)
    coupled = couplings(ir, seen.sentinel.written if seen.sentinel is not None else None)
    exact, why = pipeline_exact(ir, traffic, coupled)
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


def _gradients(ir: TrainingGraph, layered: set[Any], seen: _Evidence) -> list[tuple[str, str]]:
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
    seen: _Evidence,
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


def _untrained(ir: TrainingGraph, seen: _Evidence) -> list[str]:
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
