"""The assertion that pipelined training has the trajectory of lock-step training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from locc.errors import LoccError
from locc.ir.view import DATA
from locc.program import Program
from locc.proof import Certificate
from locc.runtime.untouched import untouched

from .alone import MissingError, Tape
from .trial import Holdings, State, Trial, batch_of, certificate_of, difference, first_line

FEWEST = 4
"""Batches that are made up where none are given, or one more than there are stages."""


def assert_pipeline_exact(program: Program, batches: Iterable[tuple[Any, Any]] | None = None) -> None:
    """Assert that training this program in a pipeline gives what lock-step training gives, bit for bit.

    Simulates the pipeline in this process: at clock c the stage of rank r trains on batch c - r with its
    own instructions, and reads what earlier stages computed from that batch, before their later updates.
    Parameters, buffers, optimizer state and objectives are compared at the end with those of lock-step
    training on the same batches, in the program's current phase. A stage is a module with those auxiliaries
    that feed it back. The program is bit for bit as it was afterwards.

    Example:
        >>> program = locc.compile(model, "dgl", splits=["layer1", "layer2"], example_inputs=x)
        >>> locc.testing.assert_pipeline_exact(program, [(x1, y1), (x2, y2), (x3, y3), (x4, y4)])

    Args:
        program: a compiled program.
        batches: (x, y) pairs as `step` takes them, at least two and not all the same; made up from the
            example inputs without them.

    Raises:
        AssertionError: the certificate says that the program is not pipeline-exact, with its reason; or it
            claims that it is, and the simulation differs.
        LoccError: too few batches, or none could be made up.
        RunError: an objective is not finite in lock-step training.
    """
    values = _given(program, batches) if batches is not None else None
    certificate = certificate_of(program)
    if not certificate.pipeline_exact:
        raise AssertionError(
            f"the program of method '{program.method}' is not pipeline-exact: {certificate.pipeline_reason}"
        )
    stages = _stages(certificate)
    if values is None:
        values = _made_up(program, max(FEWEST, len(stages) + 1))
    expected = _lockstep(program, values)
    found = _pipelined(program, values, stages)
    for owner, state in expected.items():
        different = difference(state, found[owner])
        if different is not None:
            raise AssertionError(
                _wrong(program, f"{different} of '{owner}' comes out different after {len(values)} batches")
            )


def _wrong(program: Program, what: str) -> str:
    return (
        f"the certificate claims that the program of method '{program.method}' is pipeline-exact, which is "
        f"wrong: {what}\n"
        "  remedy: find what the module reads beside its boundary values (an attribute, a buffer or a global "
        "that another module changes); locc.testing.assert_isolated(program, x, y) names it"
    )


def _stopped(program: Program, owners: frozenset[str], number: int, error: Exception) -> str:
    names = ", ".join(f"'{name}'" for name in sorted(owners))
    what = str(error) if isinstance(error, MissingError) else f"fails with {first_line(error)}"
    return _wrong(program, f"the pipeline stops on batch {number + 1}, where {names} {what}")


def _given(program: Program, batches: Iterable[tuple[Any, Any]]) -> list[list[Any]]:
    pairs = list(batches)
    if len(pairs) < 2:
        raise LoccError(
            f"a pipeline differs from lock-step training from the second batch on; found {len(pairs)} "
            "batch(es), give at least two different ones"
        )
    program.complete(pairs[0][0])
    return [program.bind(x, y) for x, y in pairs]


def _made_up(program: Program, count: int) -> list[list[Any]]:
    example = program.ir.captured.example
    if example is None:
        raise LoccError("the program keeps no example inputs; give batches of your own, [(x, y), ...]")
    with untouched(program):
        first = batch_of(program, example, None)
    draw = torch.Generator().manual_seed(0)

    def another(value: Any, number: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        rolled = value.roll(number)  # over all elements, so that token ids stay token ids
        if not value.is_floating_point():
            return rolled
        scale = 1 + 0.1 * torch.rand(value.shape, generator=draw)
        return rolled * scale.to(value) if number else value

    inputs, target = first[:-1], first[-1]
    return [
        [another(v, i) for v in inputs] + [tree_map(lambda t, i=i: _rolled(t, i), target)]
        for i in range(count)
    ]


def _rolled(value: Any, number: int) -> Any:
    return value.roll(number) if isinstance(value, Tensor) else value


def _stages(certificate: Certificate) -> list[frozenset[str]]:
    """Return the owners of each stage, in an order in which every value goes to a later stage.

    Raises:
        AssertionError: values go round between modules.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(o.name for o in certificate.owners)
    graph.add_edges_from((f.producer, f.consumer) for f in certificate.flows if f.producer != DATA)
    rings = nx.condensation(graph)
    place = {o.name: i for i, o in enumerate(certificate.owners)}
    members = {r: frozenset(rings.nodes[r]["members"]) for r in rings}
    for ring in members.values():
        if len({certificate.owner(name).index for name in ring}) > 1:
            raise AssertionError(
                "the certificate claims that the program is pipeline-exact, which is wrong: by its own "
                f"flows, values go round between {', '.join(repr(n) for n in sorted(ring))}"
            )
    order = nx.lexicographical_topological_sort(rings, key=lambda r: min(place[n] for n in members[r]))
    return [members[r] for r in order]


def _lockstep(program: Program, values: list[list[Any]]) -> dict[str, State]:
    plan = program.plan(program.phase)
    with untouched(program):
        trial = Trial(program, guarded=True)
        done = [trial.run(plan, batch, i) for i, batch in enumerate(values)]
        holdings = Holdings(program)
        return {owner: holdings.state(owner, done) for owner in program.ir.owners}


def _pipelined(program: Program, values: list[list[Any]], stages: list[frozenset[str]]) -> dict[str, State]:
    plan = program.plan(program.phase)
    with untouched(program):
        trial = Trial(program)
        flight = [Tape() for _ in values]
        done: list[dict[str, Tensor]] = [{} for _ in values]
        for clock in range(len(values) + len(stages) - 1):
            for rank, owners in enumerate(stages):
                number = clock - rank
                if 0 <= number < len(values):
                    tape = flight[number]
                    part = tape.only(plan, owners)
                    try:
                        ended = trial.run(part, values[number], number, tape.record)
                    except Exception as error:  # a stage runs the user's own code, which may raise anything
                        raise AssertionError(_stopped(program, owners, number, error)) from error
                    done[number].update(ended)
        holdings = Holdings(program)
        return {owner: holdings.state(owner, done) for owner in program.ir.owners}
