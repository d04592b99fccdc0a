"""One mutant: what it really is, what the verifier says, and what each check says alone."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch

import locc
from locc.errors import GraphError
from locc.ir import Inputs, TrainingGraph, invariants
from locc.ir.captured import strip
from locc.proof import Certificate, sentinel, static, storage, walk
from locc.proof.experiment.batch import small_batch
from locc.proof.findings import Finding
from locc.runtime import Learner

from . import edges, labels, scalars, tensors  # noqa: F401  # they register their operators
from .oracle import SEEDS, Holding, Move, Seen, Truth, classify, foreign_moves, run
from .order import CycleError
from .sites import GRAPH, LEARNER, arrange
from .subjects import Subject, copied

KILLED, MALFORMED, ACCEPTED, CRASHED = "killed", "malformed", "accepted", "crashed"
FACTS, HASH, TENSOR, VALUE, NOTHING = "facts", "hash", "tensor", "value", "nothing"
OPERATORS = (*GRAPH, *LEARNER)
CHECKS = ("reachability", "walk", "sentinel", "storage")


@dataclass(frozen=True)
class Mutant:
    """A mutant and its verdict.

    Attributes:
        truth: what the oracle says of it.
        evidence: for a leak, the first foreign moves.
        outcome: "killed" (a LocalityError), "malformed" (another LoccError), "accepted" or "crashed".
        message: the first line of the error; for an accepted mutant, an incomplete check's reason.
        named: for a kill of a leak, what the findings name: the foreign "tensor", another "value", "nothing".
        shown: for an accepted one, what of the certificate differs from the clean program's.
        alone: for a leak, the checks that find it on their own.
        invalid: whether the invariants that hold after every pass refuse it.
    """

    method: str
    shape: str
    operator: str
    site: str
    truth: Truth
    evidence: tuple[Move, ...]
    outcome: str
    message: str
    named: str
    shown: str
    alone: frozenset[str] = frozenset()
    invalid: bool = False

    def __str__(self) -> str:
        move = (
            f"; {self.evidence[0].how} of '{self.evidence[0].by}' to {self.evidence[0].path}"
            if self.evidence
            else ""
        )
        where = f"{self.method} / {self.shape} / {self.operator} / {self.site}"
        return f"{where}: {self.truth}{move}; {self.outcome} {self.message[:200]}"

    @property
    def refused(self) -> bool:
        """Whether `locc.verify` raised an error that it may raise."""
        return self.outcome in (KILLED, MALFORMED)

    @property
    def false_alarm(self) -> bool:
        """Whether a valid graph that trains as the clean program does is called not local."""
        return self.truth is Truth.SAME and self.outcome == KILLED and not self.invalid

    @property
    def survives(self) -> bool:
        """Whether the verifier lets something pass that it must not."""
        if self.truth is Truth.LEAK:
            return self.outcome != KILLED or self.named == NOTHING
        hidden = self.truth is Truth.CHANGED and self.outcome == ACCEPTED and self.shown == NOTHING
        return hidden or self.outcome == CRASHED


@dataclass
class Count:
    """What was not judged: mutants that are no program, or that no machine can run."""

    circular: int = 0
    broken: list[str] = field(default_factory=list)


class Judge:
    """Judges the mutants of one clean program."""

    def __init__(self, subject: Subject, *, alone: bool = True) -> None:
        self.subject, self.program, self.alone = subject, subject.program, alone
        ir = self.program.ir
        self.tensors = ir.captured.signature.bind(Inputs.of(self.program.model, subject.x))
        self.dtype = self._dtype(ir)
        self.clean = [self._run(ir, seed) for seed in SEEDS]
        self.count = Count()

    def _dtype(self, ir: TrainingGraph) -> torch.dtype:
        """float64, unless the graph itself makes float32 values."""
        try:
            run(ir, self.tensors, self.subject.y, 0, dtype=torch.float64)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            return torch.float32
        return torch.float64

    def _run(self, ir: TrainingGraph, seed: int) -> Seen:
        return run(ir, self.tensors, self.subject.y, seed, dtype=self.dtype)

    @cached_property
    def facts(self) -> tuple[dict[str, Any], str]:
        """What the clean program's certificate declares, and its hash."""
        ir = copied(self.program.ir)
        return _declared(self._verify(ir, self._learners(ir)))

    def names(self, each: int | None = None) -> list[tuple[str, int]]:
        """Return the mutants of the program as (operator, number of the site).

        With `each`, at most so many sites of an operator: evenly spaced, from a start that the program's
        name gives, so that other programs have other sites.
        """
        ir = copied(self.program.ir)
        learners = self._learners(ir)
        counts = {name: sum(1 for _ in self._sites(name, ir, learners)) for name in OPERATORS}
        start = zlib.crc32(f"{self.subject.method} {self.subject.shape}".encode())
        return [(name, i) for name, count in counts.items() for i in _spaced(count, each, start)]

    def _learners(self, ir: TrainingGraph) -> dict[str, Learner]:
        return self.program.settings.learners(ir)

    @staticmethod
    def _sites(name: str, ir: TrainingGraph, learners: dict[str, Learner]) -> Iterator[Any]:
        return GRAPH[name](ir) if name in GRAPH else LEARNER[name](ir, learners)

    # ---- one mutant -------------------------------------------------------------------------

    def mutant(self, name: str, number: int) -> tuple[str, TrainingGraph, dict[str, Learner]]:
        """Make a mutant: the site, the graph and the optimizers.

        Raises:
            CycleError: the mutated nodes depend on each other in a circle.
        """
        ir = copied(self.program.ir)
        learners = self._learners(ir)
        site, change = next(islice(self._sites(name, ir, learners), number, None))
        change()
        arrange(ir)
        return site, ir, learners if name in LEARNER else self._learners(ir)

    def judge(self, name: str, number: int) -> Mutant | None:
        """Return the verdict on one mutant; None for what is no program."""
        try:
            site, ir, learners = self.mutant(name, number)
            truth, moves = self._truth(ir, learners)
        except CycleError:
            self.count.circular += 1
            return None
        except Exception as error:  # shapes that do not fit, a value changed under the tape: nothing to train
            self.count.broken.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            return None
        outcome, message, named, certificate = self._asked(ir, learners, moves)
        leak = truth is Truth.LEAK
        return Mutant(
            self.subject.method,
            self.subject.shape,
            name,
            site,
            truth,
            tuple(moves[:3]),
            outcome,
            message,
            named,
            "" if certificate is None else self._shown(certificate),
            frozenset(_alone(ir, learners)) if leak and self.alone else frozenset(),
            _invalid(ir),
        )

    def _truth(self, ir: TrainingGraph, learners: dict[str, Learner]) -> tuple[Truth, list[Move]]:
        """Ask the oracle, at one random point after the other until something foreign moves."""
        runs: list[Seen] = []
        for seed in SEEDS:
            runs.append(self._run(ir, seed))
            moves = foreign_moves(ir, runs, _holdings(learners))
            if moves:
                return Truth.LEAK, moves
        return classify(self.clean, runs), []

    def _verify(self, ir: TrainingGraph, learners: dict[str, Learner]) -> Certificate:
        built = self.program.built
        self.program._built = dataclasses.replace(built, ir=ir, learners=learners)
        try:
            return locc.verify(self.program)
        finally:
            self.program._built = built

    def _asked(
        self, ir: TrainingGraph, learners: dict[str, Learner], moves: Sequence[Move]
    ) -> tuple[str, str, str, Certificate | None]:
        try:
            certificate = self._verify(ir, learners)
        except locc.LocalityError as error:
            return KILLED, error.findings[0].text, _named(ir, error.findings, moves), None
        except locc.LoccError as error:
            return MALFORMED, str(error).splitlines()[0], NOTHING, None
        except Exception as error:  # verify must refuse or accept, whatever it is given
            return CRASHED, f"{type(error).__name__}: {error}", NOTHING, None
        reasons = [f"{c.name} {c.status}: {c.detail}" for c in certificate.checks if c.status != "held"]
        return ACCEPTED, "; ".join(reasons), NOTHING, certificate

    def _shown(self, certificate: Certificate) -> str:
        before, old = self.facts
        now, new = _declared(certificate)
        return FACTS if now != before else HASH if new != old else NOTHING


def _spaced(count: int, wanted: int | None, start: int) -> list[int]:
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted({(start + i * count // wanted) % count for i in range(wanted)})


def _named(ir: TrainingGraph, findings: Sequence[Finding], moves: Sequence[Move]) -> str:
    """Say whether findings name what really is moved, or at least a value of the graph."""
    moved = {strip(move.path) for move in moves}
    if any(f.tensor in moved or any(f"'{path}'" in f.text for path in moved) for f in findings):
        return TENSOR
    values = {n.name for n in ir.graph.nodes} | {strip(p) for p, _ in ir.root.named_parameters()}
    return VALUE if any(f.tensor in values for f in findings) else NOTHING


def _declared(certificate: Certificate) -> tuple[dict[str, Any], str]:
    """Return what a certificate states of the program, and its hash.

    Left out are the account of how it was checked and the estimates of memory, which say nothing of locality.
    """
    facts = dataclasses.asdict(certificate)
    for owner in facts["owners"]:
        owner.pop("peak_memory", None)
    for name in ("checks", "memory"):
        facts.pop(name, None)
    return facts, facts.pop("graph_hash")


def _holdings(learners: Mapping[str, Learner]) -> dict[str, Holding]:
    return {
        owner: Holding([p for g in held.optimizer.param_groups for p in g["params"]], held.parameters)
        for owner, held in learners.items()
    }


def _alone(ir: TrainingGraph, learners: Mapping[str, Learner]) -> Iterator[str]:
    """Yield the checks that find something when each runs without the others."""
    optimizers = {owner: learner.optimizer for owner, learner in learners.items()}
    assert ir.captured.example is not None
    batch = small_batch(ir, ir.captured.example)
    checks: tuple[Callable[[], Sequence[Finding]], ...] = (
        lambda: static.check(ir),
        lambda: walk.check(ir, batch).findings,
        lambda: sentinel.check(ir, optimizers, batch).findings,
        lambda: storage.check(ir, learners),
    )
    for name, check in zip(CHECKS, checks, strict=True):
        try:
            if check():
                yield name
        except Exception:  # a check that cannot run finds nothing
            continue


def _invalid(ir: TrainingGraph) -> bool:
    try:
        invariants.check(ir, "mutant")
    except GraphError:
        return True
    return False
