"""The loss and the accuracy of the inference path, in one process or among ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from locc.errors import LoccError
from locc.losses import judged
from locc.runtime import ranks as among
from locc.runtime.history import Evaluation
from locc.runtime.member import Member
from locc.runtime.program import Compiled
from locc.runtime.stops import empty


def batch_of(batch: Any, within: bool = False) -> tuple[Any, Any]:
    """Split what a loader yields into (x, y).

    A pair is (x, y); a longer tuple is (inputs..., y); a dict gives up its "labels" or "target", unless the
    labels belong `within` the model's inputs.

    Raises:
        LoccError: there is no target to be found.
    """
    if isinstance(batch, Mapping):
        if within:
            return batch, None
        for key in ("labels", "target", "targets", "label"):
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise LoccError(f"a batch is a dict with keys {list(batch)} and none of them is 'labels' or 'target'")
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise LoccError(
        f"the loader must yield (x, y) pairs, (inputs..., y) or a dict with 'labels';"
        f" found {type(batch).__name__}"
    )


def check_iterable(loader: Any, name: str) -> None:
    """Raise LoccError unless a loader can be iterated."""
    if not isinstance(loader, Iterable):
        hint = ", such as a DataLoader of it" if hasattr(loader, "__getitem__") else ""
        raise LoccError(f"{name} must be an iterable of batches{hint}; found {type(loader).__name__}")


@torch.no_grad()
def evaluate(program: Compiled, loader: Iterable[Any]) -> Evaluation:
    """Evaluate the inference path in eval mode, and return to the mode of before.

    The loss is the mean over the batches, weighted by their number of samples. Where each rank holds its own
    modules only, all ranks call it, and batches pass from one to the next as they do in training.

    Raises:
        LoccError: the loader is none, or yields nothing.
        RunError: it yields a batch without samples, or a rank has stopped.
    """
    check_iterable(loader, "loader")
    member = program.member
    if member is None or not member.ranks.stale:
        return _evaluated(program, loader, None)
    with member.ranks.failing():
        return _evaluated(program, loader, member)


def _evaluated(program: Compiled, loader: Iterable[Any], member: Member | None) -> Evaluation:
    if member is not None:
        member.ranks.share(among.lent(member.ranks, program.ir))
    mode = {module: module.training for module in program.modules()}
    program.eval()
    sums = [0.0, 0.0, 0.0]
    total = 0
    try:
        for batch in loader:
            x, y = batch_of(batch, program.settings.labels_within)
            size = _size(y, x)
            if size == 0:
                raise empty()
            total += size
            found = _judged(program, x, y) if member is None else member.tried(x, y)
            if found is not None:
                loss, *counts = found.tolist()
                sums = [a + b for a, b in zip(sums, (loss * size, *counts), strict=True)]
        if member is not None:
            member.ranks.follow(among.JUDGED, program.steps)
            sums = member.ranks.gathered(sums)[member.ranks.first(program.ir.last.name)]
    finally:
        for module, training in mode.items():
            module.training = training
    if total == 0:
        raise LoccError("the loader yielded no batch to evaluate")
    summed, hits, asked = sums
    return Evaluation(summed / total, hits / asked if asked else None, total)


def _judged(program: Compiled, x: Any, y: Any) -> Tensor:
    return judged(program.loss_function, program.predict(x), program.moved(y))


def _size(y: Any, x: Any) -> int:
    for value in torch.utils._pytree.tree_leaves((y, x)):
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    return 1
