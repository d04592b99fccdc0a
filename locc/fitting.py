"""What training takes in memory, by the estimate of a step and what is kept from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from locc.budget import Load, MemoryBudget
from locc.errors import SplitError
from locc.ir import Inputs, TrainingGraph
from locc.ir.memory import memory_of
from locc.ir.view import node_tensors
from locc.lower import lower, stages
from locc.proof.experiment.batch import small_batch, whole_batch
from locc.proof.experiment.worlds import reason
from locc.proof.memory import Estimate, estimate
from locc.runtime import Settings

_MARGIN = 1.02
"""Of what a step is estimated to take, a real one takes so much at most (`tests/verify/test_memory.py`)."""


def loads(
    ir: TrainingGraph, name: str, settings: Settings, inputs: Inputs, wanted: MemoryBudget
) -> list[Load]:
    """Return what each owner's worst moment takes when a method's graph trains on batches of the wanted size.

    Raises:
        SplitError: a step does not run on shapes alone.
        LoccError: the settings do not fit the graph.
    """
    found = _estimate(ir, name, settings, inputs, wanted)
    waits = settings.offload is not None

    def own(owner: str) -> tuple[int, int]:
        tensors = (t for node in ir.nodes(owner) for _, t in node_tensors(ir.root, node))
        return _bytes(tensors), found.states.get(owner, 0)

    loads = []
    for owner, step in found.memory.owners:
        parameters, optimizer = found.memory.parameters, found.memory.optimizer
        of = [owner] if waits else list(ir.owners)
        if waits:
            parameters, optimizer = own(owner)
            if settings.visits:  # whichever comes next
                others = [own(o) for o in ir.owners if o != owner]
                parameters += max((p for p, _ in others), default=0)
                optimizer += max((o for _, o in others), default=0)
        step = math.ceil(step * _MARGIN)
        if settings.accumulate > 1:  # gradients wait for the next step
            step += _bytes(p for o in of for p in ir.parameters(o).values() if p.requires_grad)
        copies = 2 if settings.atomic else 1
        index = ir.owners[owner].index
        loads.append(Load(owner, index, copies * parameters, copies * optimizer, step))
    return loads


def _estimate(
    ir: TrainingGraph, name: str, settings: Settings, inputs: Inputs, wanted: MemoryBudget
) -> Estimate:
    sequential = settings.schedule == "sequential"
    plans = [lower(ir, frozenset(phase.trains)) for phase in stages(ir, name, True)] if sequential else None
    optimizers = {owner: learner.optimizer for owner, learner in settings.learners(ir).items()}
    batch = whole_batch(ir, inputs, small_batch(ir, inputs), wanted.batch)
    try:
        return estimate(ir, optimizers, batch, plans)
    except Exception as error:  # whatever a model raises that does not run on shapes
        raise SplitError(
            f"{wanted}: a step does not run on shapes alone, so that what it takes is not known "
            f"({reason(error)}); name the splits instead"
        ) from error


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {memory_of(t): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
