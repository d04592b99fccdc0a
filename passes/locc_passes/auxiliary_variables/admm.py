"""`admm`: alternating direction method of multipliers, without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from locc.ir import TrainingGraph
from locc.rewrite import Pass, option, spec_of
from locc_passes.auxiliary_variables.blocks import BlockMethod, Blocks, Formula, check
from locc_passes.auxiliary_variables.formulas import (
    OUTPUTS,
    affine,
    bent,
    fitted_bias,
    fitted_input,
    fitted_weight,
)
from locc_passes.auxiliary_variables.layers import layers_of, unlayered


def centered(m: Tensor, multiplier: Tensor, weight: float) -> Tensor:
    """Return m - multiplier / weight: where <z, multiplier> + weight / 2 ||z - m||^2 has its minimum."""
    return m - multiplier / weight


def raised(multiplier: Tensor, z: Tensor, m: Tensor, beta: float, count: Tensor, warm: int) -> Tensor:
    """Return multiplier + beta (z - m), and the multiplier itself in the first `warm` sweeps."""
    return torch.where(count < warm, multiplier, multiplier + beta * (z - m))


def counted(count: Tensor) -> Tensor:
    """Return the number of sweeps after one more."""
    return count + 1


@dataclass(frozen=True)
class UpwardSweep(Pass):
    """Sets W_l, a_l and z_l of each layer to the minimum of the Lagrangian, the first layer first.

    L = loss(z_L, y) + <z_L, lambda> + beta ||z_L - W_L a_(L-1) - b_L||^2
        + sum over l < L of beta ||z_l - W_l a_(l-1) - b_l||^2 + gamma ||a_l - sigma(z_l)||^2,
    and alpha ||. - its old value||^2 for W_l and b_l. Then lambda += beta (z_L - W_L a_(L-1) - b_L).
    """

    beta: float = 1.0
    gamma: float = 10.0
    alpha: float = 1.0
    sweeps: int = 6
    warm: int = 6
    output: str = "hinge"
    rounds: int = 10

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse networks that are no chain of layers, and those that end in a nonlinearity."""
        yield from unlayered(ir)
        yield from unlinear(ir)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the sweeps; the user's loss is only reported."""
        ir.apply_loss()
        blocks = Blocks(ir, "z", "a")
        for i, layer in enumerate(blocks.layers, start=1):
            blocks.begin(f"z{i}", layer.pre)
            if i < blocks.last:
                blocks.begin(f"a{i}", layer.post)
        last, owner = blocks.last, blocks.layer(blocks.last).owner
        blocks.begin(f"m{last}", 0.0, spec_of(blocks.layer(last).pre))
        blocks.begin(f"n{last}", 0.0, ir.scalar)
        for _ in range(self.sweeps):
            for i in range(1, last):
                self._weights(blocks, i)
                self._activation(blocks, i)
            self._weights(blocks, last)
            m = self._product(blocks, last)
            center = blocks.run(owner, centered, m, f"m{last}", 2 * self.beta, name="center")
            blocks.set_output(f"z{last}", self.output, center, 2 * self.beta)
            blocks.set(f"m{last}", raised, f"m{last}", f"z{last}", m, self.beta, f"n{last}", self.warm)
            blocks.set(f"n{last}", counted, f"n{last}")
        blocks.finish()

    def _weights(self, blocks: Blocks, i: int) -> None:
        product, around = blocks.layer(i).product, (f"a{i - 1}", f"z{i}")
        weights = (self.beta, self.alpha)
        blocks.set(f"W{i}", Formula(fitted_weight, (product,)), *around, f"b{i}", f"W{i}", *weights)
        blocks.set(f"b{i}", Formula(fitted_bias, (product,)), *around, f"W{i}", f"b{i}", *weights)

    def _activation(self, blocks: Blocks, i: int) -> None:
        layer, above = blocks.layer(i), blocks.layer(i + 1)
        solve = Formula(fitted_input, (above.product, layer.bend, self.rounds))
        around = (f"a{i}", f"z{i}", f"z{i + 1}", f"W{i + 1}", f"b{i + 1}")
        blocks.set(f"a{i}", solve, *around, self.beta, self.gamma)
        m, weight = self._product(blocks, i), self.beta / self.gamma
        blocks.set(f"z{i}", Formula(bent, (layer.bend,)), f"a{i}", m, weight, f"z{i}")

    @staticmethod
    def _product(blocks: Blocks, i: int) -> fx.Node:
        """Return W_i a_(i-1) + b_i."""
        layer = blocks.layer(i)
        product = Formula(affine, (layer.product,))
        return blocks.run(layer.owner, product, f"a{i - 1}", f"W{i}", f"b{i}", name="product")


def unlinear(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence where the last layer ends in a nonlinearity, for `requires`."""
    if not list(unlayered(ir)) and layers_of(ir)[-1].bend.function is not None:
        yield (
            "its output passes a nonlinearity, and the multiplier belongs to a linear output; "
            "leave the nonlinearity to the loss"
        )


@dataclass(frozen=True)
class ADMM(BlockMethod):
    """Alternating directions: layer-wise least squares, and a multiplier at the output.

    A step is some sweeps from the first layer up (see `UpwardSweep`); each brings the label down by one
    layer, so a new batch needs one more than there are layers, and the same batch in every step one alone, as
    published. The paper has no biases, takes pseudo-inverses, and starts from noise; here alpha keeps the
    weights near and the system solvable, and the start is a forward pass, so that a minibatch moves the
    weights from where they are.

    The user's loss is reported and trains nothing; `output` is what does. The variables live on while a step
    gets the same batch, in the same order, as the one before (full-batch training; `shuffle=False`).
    On another batch they start anew by a forward pass, and the multiplier at 0.
    """

    reference: ClassVar[str] = "Taylor et al. 2016, Training neural networks without gradients"

    beta: float = option(1.0, "weight of the products' constraint", range=(0.01, 100.0), scale="log")
    gamma: float = option(10.0, "weight of the nonlinearities' constraint", range=(0.01, 100.0), scale="log")
    alpha: float = option(1.0, "how far weights stay where they were", range=(0.001, 100.0), scale="log")
    sweeps: int = option(6, "sweeps over all blocks in a step", range=(1, 20))
    warm: int = option(6, "sweeps on a batch before its multiplier moves", range=(0, 100))
    output: str = option("hinge", "loss at the output, in the place of the user's", choices=OUTPUTS)
    rounds: int = option(10, "conjugate-gradient rounds for what a convolution reads", range=(1, 50))

    def __post_init__(self) -> None:
        check(self, ("beta", "gamma", "alpha"), ("sweeps", "rounds"))

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of too few sweeps for a new batch."""
        layers = len(layers_of(ir))
        if self.sweeps <= layers:
            yield (
                f"a sweep brings the label down by one layer, so {self.sweeps} sweeps on a new batch leave "
                f"some of the {layers} layers as they are; give sweeps={layers + 1}, or the same batch in "
                "every step"
            )

    def passes(self) -> Sequence[Pass]:
        """Return the sweep."""
        return (UpwardSweep(**vars(self)),)
