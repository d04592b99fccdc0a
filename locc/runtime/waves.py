"""Several batches through one module before the next module starts: another order of the same tasks."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from locc.errors import MethodError, RunError
from locc.facts import Certificate
from locc.facts.derive import derive
from locc.facts.traffic import couplings, flows, pipeline_exact
from locc.ir import TrainingGraph
from locc.ir.view import DATA
from locc.lower import ModuleProgram, Receive, Send
from locc.runtime.executor import Executor
from locc.runtime.progress import Rest

Found = tuple[dict[str, Tensor], Tensor | None]
"""Objectives by name, and the loss."""
Updated = Callable[[int, tuple[str, ...], Mapping[str, Tensor]], None]
"""Told after a module's step: the number of the batch, its owners, and their objectives by name."""


class Mail:
    """Carries the values of one batch from module to module; they stay here until they are read."""

    def __init__(self, homes: Mapping[str, str]) -> None:
        self._homes = homes
        self._boxes: defaultdict[tuple[str, str], deque[Any]] = defaultdict(deque)

    def send(self, instruction: Send, value: Any) -> None:
        """Hand on a value; returns at once."""
        for home in dict.fromkeys(self._homes[owner] for owner in instruction.to):
            self._boxes[home, instruction.value].append(value)

    def receive(self, instruction: Receive) -> Any:
        """Return the value that was sent."""
        return self._boxes[self._homes[instruction.owner], instruction.value].popleft()

    def peek(self, instruction: Receive) -> Any:
        """Return the value that `receive` will."""
        return self._boxes[self._homes[instruction.owner], instruction.value][0]


def check(ir: TrainingGraph, name: str, certificate: Certificate | None, schedule: str) -> None:
    """Refuse a program whose modules cannot be at different batches.

    Without a certificate, whose checks know what the modules' own code shares, by the graph alone.

    Raises:
        MethodError: says what goes down, or what modules share.
    """
    if certificate is not None:
        exact, why = certificate.pipeline_exact, certificate.pipeline_reason
    else:
        exact, why = pipeline_exact(flows(ir, derive(ir)), couplings(ir, None))
    asked, instead = "trains a module on batches that later modules have not seen", "use schedule='lockstep'"
    if schedule == "lockstep":
        asked, instead = "with group= ends a module's step before later ones begin theirs", "leave out group="
    if not exact:
        raise MethodError(
            f"schedule='{schedule}' {asked}, and the program of method '{name}' is not pipeline-exact: "
            f"{why}; {instead}"
        )


def ordered(programs: Mapping[str, ModuleProgram]) -> list[ModuleProgram]:
    """Return the programs so that each comes after those that it waits for, in forward order otherwise."""
    homes = {owner: name for name, part in programs.items() for owner in part.owners}
    place = {name: i for i, name in enumerate(programs)}
    before: nx.DiGraph[str] = nx.DiGraph()
    before.add_nodes_from(programs)
    for name, part in programs.items():
        before.add_edges_from((homes[r.source], name) for r in part.receives if r.source != DATA)
    return [programs[name] for name in nx.lexicographical_topological_sort(before, key=place.__getitem__)]


def run(
    executor: Executor,
    programs: Sequence[ModuleProgram],
    batches: Iterable[list[Any]],
    step: int,
    updated: Updated,
) -> list[Found]:
    """Train each module on all batches.

    Args:
        executor: runs a program on a batch.
        programs: of the modules, as `ordered` returns them.
        batches: the values of a plan's inputs, for each batch.
        step: the number of the first batch, from which random streams are counted.
        updated: is told of each module's step.

    Returns:
        For each batch its objectives by name and its loss.

    Raises:
        RunError: see `Executor.run`; modules before the one that it names have trained on all batches.
    """
    homes = {owner: part.name for part in programs for owner in part.owners}
    every = list(batches)
    flight = [Mail(homes) for _ in every]
    moved: list[str] = []
    found: list[Found] = [({}, None) for _ in every]
    for part in programs:
        for number, (values, mail) in enumerate(zip(every, flight, strict=True)):
            objectives, loss = executor.run(part.plan, values, step + number, mail, moved)
            updated(number, part.owners, objectives)
            known, before = found[number]
            found[number] = (known | objectives, before if loss is None else loss)
    return found


def alike(left: Rest, most: int) -> Iterator[list[Any]]:
    """Yield up to `most` batches of one shape at a time; where drawing one fails, those before it go back."""
    while True:
        wave: list[Any] = []
        try:
            for batch in left:
                if wave and _shapes(batch) != _shapes(wave[0]):
                    left.back.append(batch)
                    break
                wave.append(batch)
                if len(wave) == most:
                    break
        except BaseException:
            left.back += reversed(wave)
            raise
        if not wave:
            return
        yield wave


def check_alike(batches: Sequence[Any]) -> None:
    """Refuse a wave without batches, or of several shapes: what lives across steps has the shape of one.

    Raises:
        RunError: it is such a wave.
    """
    if not batches:
        raise RunError("program.wave(batches) was given no batch; give a list of (x, y) pairs")
    for number, batch in enumerate(batches):
        if _shapes(batch) != _shapes(batches[0]):
            raise RunError(
                f"batch {number} of a wave has the shapes {[tuple(s) for s in _shapes(batch)]}, the first "
                f"one {[tuple(s) for s in _shapes(batches[0])]}; begin a new wave with it"
            )


def _shapes(batch: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
