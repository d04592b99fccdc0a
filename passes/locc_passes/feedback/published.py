"""What random feedback was published with, and what it needs of a network."""

from __future__ import annotations

from collections.abc import Iterator

from locc.ir import TrainingGraph
from locc.rewrite import (
    OptimizerSpec,
    Recipe,
    averages_positions,
    has_norms,
    has_rectifiers,
    prediction_spec,
)

RECIPE = Recipe(
    OptimizerSpec("rmsprop", 1e-4),
    source="Nøkland 2016, released code, for fa and dfa; batches of 64, 300 epochs",
    network="tanh units whose weights start at zero (zero_init=True), or ReLUs",
)


def advice(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for a network of ReLUs without normalisation."""
    if len(ir.modules) > 1 and has_rectifiers(ir) and not has_norms(ir):
        yield (
            "the network has ReLUs and no normalisation, and learns slowly from random feedback; put "
            "an nn.BatchNorm before each ReLU"
        )


def averaged_away(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for a mean over positions each of which is sent an error of its own."""
    sent = any(len(b.spec.shape) > 2 for b in ir.boundaries() if b.differentiable)
    if sent and len(prediction_spec(ir).shape) == 2 and averages_positions(ir):
        yield (
            "the network averages over positions, and the random feedback that each gets averages away: what "
            "lies before learns little; flatten in its place, or use a method with heads ('dgl')"
        )
