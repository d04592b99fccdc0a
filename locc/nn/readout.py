"""How the features of a boundary become a value of the shape of the model's output."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from locc.errors import MethodError
from locc.ir.spec import BatchDim, TensorSpec
from locc.nn.building import MAX_WEIGHTS, guard_weights
from locc.nn.layout import Layout, guess_layout, in_proportion, pool, regrid, split_dim


@dataclass(frozen=True)
class Readout:
    """The way from a boundary to rows of features, and from rows of results to the output's shape.

    Attributes:
        layout: of the boundary, after rows folded into its batch dimension are unfolded.
        in_features: width D of a row that `read` gives.
        out_features: width of a row that `write` takes.
        per_position: one row per position rather than one per sample.
        source: sizes of the positions read; () for one row per sample.
        target: sizes of the positions written; () for an output [B,C] or [B].
        output: layout of the output where it has positions.
        folded_in: rows of one sample that the boundary keeps in its batch dimension (1: none).
        folded_out: the output is [positions*B, C].
        squeeze: the output is [B].
    """

    layout: Layout
    in_features: int
    out_features: int
    per_position: bool
    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    output: Layout | None = None
    drop_class_token: bool = False
    folded_in: int = 1
    folded_out: bool = False
    squeeze: bool = False

    def unfold(self, h: Tensor) -> Tensor:
        """Give the boundary value `h` the shape that `layout` speaks of."""
        return h if self.folded_in == 1 else split_dim(h, 0, (-1, self.folded_in))

    def read(self, h: Tensor) -> Tensor:
        """Return the rows of `h`: [B,D], or [B,*source,D] if per position."""
        h = self.unfold(h)
        if not self.per_position:
            return pool(h, self.layout)
        rows = self.layout.last(h)
        return rows[:, 1:] if self.drop_class_token else rows

    def positions(self, h: Tensor) -> tuple[int, ...]:
        """Return the sizes of the positions that `read` gives of `h`: `source`, unless they vary."""
        shape = self.unfold(h).shape
        return tuple(shape[d] - self.drop_class_token for d in self.layout.position_dims)

    def write(self, y: Tensor) -> Tensor:
        """Give rows [B,out_features], or [B,*source,out_features] if per position, the output's shape."""
        if self.squeeze:
            return y.squeeze(-1)
        if not self.target:
            return y
        if not self.per_position:
            y = split_dim(y, -1, (*self.target, -1))
        elif self.source != self.target:  # decided when built: sequences of another length pass as they are
            y = y.movedim(-1, 1)
            y = regrid(y, in_proportion(y, self.source, self.target)).movedim(1, -1)
        if self.folded_out:
            return (y.transpose(0, 1) if self.layout.batch_dim else y).flatten(0, -2)
        return y if self.output is None else self.output.from_last(y)

    def rows_of(self, e: Tensor) -> Tensor:
        """Undo the last step of `write`: a value of the output's shape as [B,C] or [B,*target,C]."""
        if self.squeeze:
            return e.unsqueeze(-1)
        if self.folded_out and self.layout.batch_dim:
            return split_dim(e, 0, (*self.target, -1)).transpose(0, 1)
        if self.folded_out:
            return split_dim(e, 0, (-1, *self.target))
        return e if self.output is None else self.output.last(e)


class HeadOptions(TypedDict, total=False):
    """What every head takes: layouts, where a guess from shapes is wrong; where its parameters are made.

    `rank`, but of a fixed head, is that of its last layer, see `classifier`.
    """

    layout: Layout | str | None
    output_layout: Layout | str | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    rank: int | None


def classifier(width: int, classes: int, rank: int | None = None, **at: Any) -> nn.Module:
    """Return a linear layer from `width` to `classes`; with `rank`, two with so many units between them.

    The two hold rank * (width + classes) weights, fewer where there are many classes.
    """
    if rank is None:
        return nn.Linear(width, classes, **at)
    return nn.Sequential(nn.Linear(width, rank, bias=False, **at), nn.Linear(rank, classes, **at))


class Head(nn.Module, ABC):
    """A network from a boundary to a value of the output's shape; a subclass says what it makes of rows."""

    def __init__(self, spec: TensorSpec, output: TensorSpec, **options: Unpack[HeadOptions]) -> None:
        super().__init__()
        self.readout = plan_readout(spec, output, options.get("layout"), options.get("output_layout"))

    @abstractmethod
    def rows(self, h: Tensor) -> Tensor:
        """Return what `Readout.write` takes, for the boundary `h`."""

    def forward(self, h: Tensor) -> Tensor:
        """Map the boundary `h` to the output's shape."""
        return self.readout.write(self.rows(h))


def plan_readout(
    spec: TensorSpec,
    output: TensorSpec,
    layout: Layout | str | None = None,
    output_layout: Layout | str | None = None,
) -> Readout:
    """Decide from shapes how a head reads `spec` and writes `output`.

    [B,C] and [B] are one row per sample; [B,T,V], [B,V,T], [T,B,V], [T*B,V], [B,C,H,W] and their like are one
    per position, resampled where the numbers of positions differ. A flat boundary writes all positions at
    once.

    Raises:
        MethodError: no way from `spec` to `output` is known.
    """
    folded_in, folded_out = _scale(spec), _scale(output)
    if folded_in > 1 and folded_out == 1 and len(spec.shape) == 2 and output.shape[0] == BatchDim():
        unfolded = TensorSpec((BatchDim(), folded_in, *spec.shape[1:]), spec.dtype)
        plan = plan_readout(unfolded, output, Layout.sequence(), output_layout)
        return replace(plan, folded_in=folded_in)
    found = guess_layout(spec, layout)
    width = found.channels(spec)
    if not output.dtype.is_floating_point:
        raise MethodError(f"the model's output {output} is not real floating point; a head cannot imitate it")
    if len(output.shape) == 1 and folded_in == folded_out:
        return Readout(found, width, 1, per_position=False, squeeze=True)
    source = found.sizes(spec)
    if len(output.shape) == 2 and output.batch_dim == 0:
        channels = Layout.flat().channels(output)
        if folded_in == folded_out:
            return Readout(found, width, channels, per_position=False)
        if folded_in == 1:
            return _folded(Readout(found, width, channels, True, source), folded_out, spec, output)
    if folded_in != folded_out:
        raise MethodError(
            f"the boundary {spec} has {folded_in} rows a sample and the output {output} has {folded_out}; "
            "cut where they agree or pass your own factory"
        )
    written = _output_layout(found, source, output, output_layout)
    channels, target = written.channels(output), written.sizes(output)
    if found.kind == "flat":
        guard_weights(math.prod(target) * channels, width, MAX_WEIGHTS, f"the head from {spec} to {output}")
        return Readout(found, width, math.prod(target) * channels, False, (), target, written)
    drop = found.class_token and source != target
    source = (source[0] - 1,) if drop else source
    return Readout(found, width, channels, True, source, target, written, drop)


def _folded(plan: Readout, count: int, spec: TensorSpec, output: TensorSpec) -> Readout:
    drop = plan.layout.class_token and math.prod(plan.source) == count + 1
    source = (plan.source[0] - 1,) if drop else plan.source
    if not source or math.prod(source) != count:
        raise MethodError(
            f"the output {output} has {count} rows a sample and the boundary {spec} has "
            f"{math.prod(source)} positions; return [B,T,C] from the model, or pass your own factory"
        )
    return replace(plan, source=source, target=source, drop_class_token=drop, folded_out=True)


def _output_layout(
    found: Layout, source: tuple[int, ...], output: TensorSpec, hint: Layout | str | None
) -> Layout:
    if hint is None and len(output.shape) == 3 and output.batch_dim == 0 and len(source) == 1:
        # The dimension that counts the boundary's positions is time; the other one holds the classes.
        shape = output.concrete(1)
        steps = [i for i in (1, 2) if shape[i] in (source[0], source[0] - found.class_token)]
        if steps:
            time = 2 if 2 in steps and (found.channel_dim == 1 or len(steps) == 1) else 1
            return Layout.image(1) if time == 2 else Layout.sequence()
    return replace(guess_layout(output, hint), class_token=False)


def _scale(spec: TensorSpec) -> int:
    batch = [d for d in spec.shape if isinstance(d, BatchDim)]
    if len(batch) != 1 or batch[0].offset:
        raise MethodError(f"{spec} needs exactly one dimension that is the batch; return one row per sample")
    return batch[0].rows()
