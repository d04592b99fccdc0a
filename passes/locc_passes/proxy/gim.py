"""`gim`: Greedy InfoMax, modules that learn without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import fx, nn

from locc.errors import MethodError
from locc.ir import BatchDim, TensorSpec, TrainingGraph
from locc.nn import PredictiveCoding, guess_layout, patch_grid
from locc.rewrite import Method, OptimizerSpec, OutputLoss, Pass, Recipe, layout_at, option, spec_of
from locc_passes.proxy.terms import LocalTerm


@dataclass(frozen=True)
class Predictive(LocalTerm):
    """The predictive coding of a value between its positions."""

    name: str = "coding"
    steps: int = 5
    skip: int = 1
    negatives: int = 16
    grid: int = 7

    def refusal(self, ir: TrainingGraph, value: fx.Node) -> str | None:
        """There are positions to predict from others."""
        spec = spec_of(value)
        layout = guess_layout(spec, layout_at(ir, value))
        dim = spec.shape[layout.batch_dim]
        if isinstance(dim, BatchDim) and dim.rows() > 1:
            if patch_grid(dim.rows())[0] > 1:
                return None
            return (
                f"its output {spec} has {dim.rows()} rows a sample in the batch, and patches to predict from "
                "others are a grid of two rows or more; give another number of patches"
            )
        if not layout.position_dims or layout.sizes(spec)[0] < 2:
            return (
                f"its output {spec} has no positions (rows of a map, steps in time, patches) to predict from "
                "others; cut where it has, or fold patches into the batch"
            )
        return None

    def term(self, ir: TrainingGraph, owner: str, value: fx.Node) -> fx.Node:
        """Return the loss, which the network computes."""
        return self.network(ir, owner, value, self._coding)

    def _coding(self, spec: TensorSpec, _: TensorSpec, **options: object) -> nn.Module:
        make = partial(PredictiveCoding, steps=self.steps, skip=self.skip, negatives=self.negatives)
        return make(spec, grid=self.grid, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GIM(Method):
    """Greedy InfoMax: each module but the last predicts its own output at other positions, without labels.

    The loss is InfoNCE between positions (`locc.nn.PredictiveCoding`): rows below on a map, later steps of a
    sequence. As published, the model cuts an image into overlapping patches and folds them into the batch,
    [B*49,...], so that no position has seen another; on the map of an ordinary network receptive fields
    overlap, and the task is easier than the paper's. The last module, a probe in the paper, has the user's
    loss, which alone reads the labels. Lowe, O'Connor & Veeling, "Putting an end to end-to-end" (2019), and
    its released code.
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "Lowe, O'Connor & Veeling 2019, Putting an end to end-to-end"
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("adam", 2e-4), source="Lowe et al. 2019, released code; batches of 32, 300 epochs"
    )

    steps: int = option(5, "positions ahead that are predicted", range=(1, 12))
    skip: int = option(1, "nearest positions that are not predicted", range=(0, 4))
    negatives: int = option(16, "others among which the right one is found", range=(1, 128), scale="log")
    grid: int = option(7, "a map is averaged to so many rows and columns", range=(2, 16))

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("skip", 0), ("negatives", 1), ("grid", 2)):
            if getattr(self, name) < least:
                raise MethodError(f"{name}={getattr(self, name)}: give at least {least}")

    def passes(self) -> Sequence[Pass]:
        """Return the local losses, and that of the output."""
        coding = Predictive(steps=self.steps, skip=self.skip, negatives=self.negatives, grid=self.grid)
        return (coding, OutputLoss())
