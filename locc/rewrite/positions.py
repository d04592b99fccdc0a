"""Some positions of a sequence, drawn anew in each step: what a local head trains on to be cheap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from locc.errors import LoccError, MethodError
from locc.ir import Task, TensorSpec, TrainingGraph
from locc.ir.spec import Dim, FreeDim
from locc.losses import IGNORED, described
from locc.nn import Layout, plan_readout
from locc.rewrite.layouts import output_layout, spec_of


@dataclass(frozen=True)
class Part:
    """A part of the positions of a value, for the head of a task.

    Attributes:
        read: the value [B,n,D], in its own order of dimensions, at n of its T positions.
        output: spec of the task's prediction at n positions.
    """

    read: fx.Node
    output: TensorSpec


def part_of(
    ir: TrainingGraph, owner: str, value: fx.Node, task: Task, share: float, layout: Layout | str | None
) -> Part:
    """Return a share of a value's positions, drawn in each step by the random stream of a node of `owner`.

    One draw serves all samples of a batch. Positions at which every sample's class is to be ignored (-100)
    are drawn only where there are not enough others.

    Raises:
        MethodError: the prediction is not one for each position of the value.
    """
    spec = spec_of(value)
    plan = plan_readout(spec, task.spec, layout, output_layout(ir, task))
    found = plan.output
    apart = not plan.per_position or plan.source != plan.target or len(plan.source) != 1
    if apart or found is None or plan.layout.kind != "sequence" or plan.drop_class_token:
        raise MethodError(
            f"module '{owner}': a head on a part of the positions needs a sequence with one prediction for "
            f"each position, as [B,T,D] and [B,T,V]; found the boundary {spec} and the output {task.spec}. "
            "Leave out positions= and head='sr'"
        )
    (dim,), (place,) = plan.layout.position_dims, found.position_dims
    keys = ir.emit(owner, keys_of, value, dim, role="positions")
    pick = Pick(share, place, found.channel_dim, len(task.spec.shape))
    count = pick.dim(spec.shape[dim])
    indices = TensorSpec((count,), torch.int64)
    drawn = ir.emit(owner, pick, keys, ir.target, role="positions", spec=indices)
    read = ir.emit(owner, at_positions, value, drawn, dim, role="part")
    shape = list(task.spec.shape)
    shape[place] = count
    return Part(read, replace(task.spec, shape=tuple(shape)))


def target_for(ir: TrainingGraph, owner: str, read: fx.Node) -> fx.Node:
    """Return the target for a head that reads `read`: a part of it where that is a part of the positions."""
    if read.target is not at_positions:
        return ir.target
    drawn = read.args[1]
    assert isinstance(drawn, fx.Node)
    assert isinstance(drawn.target, Pick)
    return ir.emit(owner, drawn.target.labels, ir.target, drawn, role="label", spec=ir.target.meta["spec"])


def example_of(label: fx.Node, target: Any) -> Any:
    """Return what a loss reads at `label` where the batch has `target`, at whichever positions.

    None where that has not an entry for each: of a target that was made up this says nothing.
    """
    if not isinstance(label.target, Labels):
        return target
    drawn = label.args[1]
    assert isinstance(drawn, fx.Node)
    (length,) = spec_of(drawn.all_input_nodes[0]).concrete(1)
    pick = label.target.pick
    if not pick.fits(target, length):
        return None
    return label.target(target, torch.arange(pick.count(length), device=target.device))


def keys_of(h: Tensor, dim: int) -> Tensor:
    """Return a random number for each position of `h`, [T]."""
    return torch.rand(h.shape[dim], device=h.device)


def at_positions(h: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Return `h` at some positions along `dim`."""
    return h.index_select(dim, positions)


class Pick:
    """Chooses a share of the positions by random keys, those with something to learn first.

    Attributes:
        share: of the positions, rounded, and at least one.
        place: which dimension of the output holds the positions.
        classes: and which one its classes.
        rank: number of its dimensions.
    """

    draws = False

    def __init__(self, share: float, place: int, classes: int, rank: int) -> None:
        self.share, self.place, self.classes, self.rank = share, place, classes, rank
        self.__name__ = self.__qualname__ = "pick_positions"
        self.labels = Labels(self)

    def count(self, length: int) -> int:
        """Return how many of so many positions are chosen."""
        return max(1, round(self.share * length))

    def dim(self, length: Dim) -> Dim:
        """Return the dimension of the chosen positions."""
        if isinstance(length, FreeDim):
            few = [self.count(length.at(probe)) for probe in (0, 1)]
            return FreeDim(f"{self.share:g}*{length}", *few)
        assert isinstance(length, int)
        return self.count(length)

    def along(self, target: Tensor) -> int:
        """Return which dimension of a target holds the positions."""
        return self.place - (self.classes < self.place) * (target.dim() < self.rank)

    def fits(self, target: Any, length: int) -> bool:
        """Whether a target has an entry for each of so many positions."""
        known = isinstance(target, Tensor) and target.dim() in (self.rank - 1, self.rank)
        return known and int(target.shape[self.along(target)]) == length

    def __call__(self, keys: Tensor, target: Any) -> Tensor:
        """Return the positions [n], in their order.

        Raises:
            LoccError: the target has not an entry for each position.
        """
        if not self.fits(target, len(keys)):
            raise LoccError(
                f"a head on a part of {len(keys)} positions needs a target with an entry for each of them; "
                f"found {described(target)}. Give such a target, or leave out positions= and head='sr'"
            )
        if target.dim() < self.rank and not target.is_floating_point():
            others = tuple(d for d in range(target.dim()) if d != self.along(target))
            keys = keys + (target == IGNORED).all(others).to(keys)
        return keys.argsort()[: self.count(len(keys))].sort().values


class Labels:
    """Takes what belongs to chosen positions from a target."""

    draws = False

    def __init__(self, pick: Pick) -> None:
        self.pick = pick
        self.__name__ = self.__qualname__ = "target_at"

    def __call__(self, target: Tensor, positions: Tensor) -> Tensor:
        """Return it."""
        return target.index_select(self.pick.along(target), positions)
