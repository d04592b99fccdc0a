"""What a method itself reads of the target, beside the user's loss: class ids, or numbers for the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from locc.ir import Task, TensorSpec, TrainingGraph
from locc.ir.spec import Dim
from locc.losses import described

CLASS_IDS = "class ids"
"""Integers in the shape of the output without its classes: [B], [B,T] (tokens) or [B,H,W] (pixels)."""
NUMBERS = "numbers"
"""A tensor in the shape of the output: probabilities, one-hot or many-hot rows, real values."""


def own_target(ir: TrainingGraph, owner: str, task: Task | None = None) -> fx.Node:
    """Return the target of a task (the main prediction's, unless given), for an owner's program.

    That is `ir.target`, or where the model returns several values the part of it under the task's keys.
    """
    task = ir.tasks[0] if task is None else task
    if not task.path:
        return ir.target
    return ir.emit(owner, Part(task), ir.target, role="label", spec=ir.target.meta["spec"])


class Part:
    """Takes what belongs to a task from a target."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.__name__ = self.__qualname__ = f"target_of_{task.name}"

    def __call__(self, target: Any) -> Any:
        """Return it."""
        return self.task.own(target)


def divided(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence where the model has several tasks, for the `requires` of a rule that knows one."""
    if len(ir.tasks) > 1:
        names = " and ".join(f"'{task.name}'" for task in ir.tasks)
        yield (
            f"its rule knows one prediction, and the loss reads {names}; name one, as in prediction="
            f"'{ir.tasks[0].name}', or use a method whose heads or gradients serve all ('dgl', 'dni')"
        )


def misfit(method: str, kinds: Sequence[str], output: TensorSpec, target: Any) -> str | None:
    """Return a sentence where a target is of none of the kinds that a method can read, otherwise None.

    Args:
        method: its id.
        kinds: of `CLASS_IDS` and `NUMBERS`; none where a method asks for nothing.
        output: the spec of the model's prediction.
        target: as `step` takes it.
    """
    if not kinds or any(_is(kind, output, target) for kind in kinds):
        return None
    return (
        f"method '{method}' needs {wanted(kinds, output)} as target, for the output {output}; found "
        f"{described(target)}. Nothing has changed; give such a target, or use a method that "
        "leaves it to the loss"
    )


def wanted(kinds: Sequence[str], output: TensorSpec) -> str:
    """Return some kinds of targets as text, with their shapes for an output."""
    return " or ".join(" ".join([kind, *(_text(s.shape) for s in specs(kind, output)[:1])]) for kind in kinds)


def specs(kind: str, output: TensorSpec) -> list[TensorSpec]:
    """Return the specs that a target of a kind may have, the usual one first; none without classes."""
    shape = output.shape
    if kind == NUMBERS:
        return [output]
    if len(shape) < 2:
        return []
    last, second = shape[:-1], (shape[0], *shape[2:])  # [B,T,V] has its classes last, [B,C,H,W] second
    return [TensorSpec(s, torch.int64) for s in ((second, last) if len(shape) > 3 else (last, second))]


def examples(kinds: Sequence[str], output: TensorSpec, batch: int) -> Iterator[Tensor]:
    """Yield a target of each kind for a batch."""
    for kind in kinds:
        for spec in specs(kind, output)[:1]:
            yield torch.full(spec.concrete(batch), 0.5 if kind == NUMBERS else 0, dtype=spec.dtype)


def _is(kind: str, output: TensorSpec, target: Any) -> bool:
    if not isinstance(target, Tensor) or (kind == CLASS_IDS and target.is_floating_point()):
        return False
    return any(_fits(spec.shape, target) for spec in specs(kind, output))


def _fits(shape: tuple[Dim, ...], target: Tensor) -> bool:
    pairs = zip(shape, target.shape, strict=False)
    return len(shape) == target.dim() and all(not isinstance(d, int) or d == n for d, n in pairs)


def _text(shape: Sequence[Dim]) -> str:
    return f"[{','.join(str(d) for d in shape)}]"
