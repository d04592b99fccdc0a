"""`bcd2` and `bcd3`: block coordinate descent on the weights and on every layer's activations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from locc.ir import TrainingGraph
from locc.rewrite import Pass, option
from locc_passes.auxiliary_variables.blocks import BlockMethod, Blocks, Formula, check
from locc_passes.auxiliary_variables.descent import descended_bias, descended_input, descended_weight
from locc_passes.auxiliary_variables.formulas import (
    OUTPUTS,
    affine,
    applied,
    bent,
    bent_product,
    fitted_bias,
    fitted_input,
    fitted_weight,
    mean_of,
)
from locc_passes.auxiliary_variables.layers import unlayered


@dataclass(frozen=True)
class Sweep(Pass):
    """Sets the blocks of each layer in turn, the last one first."""

    blocks: ClassVar[tuple[str, ...]] = ("V",)

    gamma: float = 1.0
    alpha: float = 5.0
    sweeps: int = 1
    output: str = "squared"
    rounds: int = 10

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse networks that are no chain of layers."""
        yield from unlayered(ir)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the sweeps; the user's loss is only reported."""
        ir.apply_loss()
        blocks = Blocks(ir, "U", "V")
        for i, layer in enumerate(blocks.layers, start=1):
            for kind in self.blocks:
                blocks.begin(f"{kind}{i}", layer.pre if kind == "U" else layer.post)
        for _ in range(self.sweeps):
            for i in range(blocks.last, 0, -1):
                self._activation(blocks, i)
                self._weights(blocks, i)
        blocks.finish()

    @abstractmethod
    def _activation(self, blocks: Blocks, i: int) -> None:
        """Set what layer i computes."""

    @abstractmethod
    def _weights(self, blocks: Blocks, i: int) -> None:
        """Set W_i, then b_i."""


@dataclass(frozen=True)
class ThreeSplitSweep(Sweep):
    """Sets V_i, U_i, W_i and b_i of each layer, the last one first, to the minimum of the objective.

    F = R(V_N, y) + sum_i gamma / 2 ||V_i - sigma_i(U_i)||^2 + rho / 2 ||U_i - W_i V_(i-1) - b_i||^2, plus
    alpha / 2 ||. - its old value||^2 for V_N, for U_i of the hidden layers, and for W_i and b_i.
    """

    blocks: ClassVar[tuple[str, ...]] = ("U", "V")

    rho: float = 1.0
    old_weight: bool = False

    def _activation(self, blocks: Blocks, i: int) -> None:
        """Set V_i, then U_i."""
        layer, last = blocks.layer(i), i == blocks.last
        if last:
            owner = layer.owner
            bent_u = blocks.run(owner, Formula(applied, (layer.bend,)), f"U{i}", name="sent")
            center = blocks.run(owner, mean_of, bent_u, self.gamma, f"V{i}", self.alpha, name="center")
            blocks.set_output(f"V{i}", self.output, center, self.gamma + self.alpha)
        else:
            above = blocks.layer(i + 1)
            solve = Formula(fitted_input, (above.product, layer.bend, self.rounds))
            around = (f"V{i}", f"U{i}", f"U{i + 1}", f"W{i + 1}", f"b{i + 1}")
            blocks.set(f"V{i}", solve, *around, self.rho, self.gamma)
        product = Formula(affine, (layer.product,))
        center = blocks.run(layer.owner, product, f"V{i - 1}", f"W{i}", f"b{i}", name="center")
        alpha = 0.0 if last else self.alpha
        if alpha:
            center = blocks.run(layer.owner, mean_of, center, self.rho, f"U{i}", alpha, name="center")
        weight = (self.rho + alpha) / self.gamma
        blocks.set(f"U{i}", Formula(bent, (layer.bend,)), f"V{i}", center, weight, f"U{i}")

    def _weights(self, blocks: Blocks, i: int) -> None:
        """Set W_i, then b_i: of the new W_i, or of the old one as the authors' code does."""
        product, around = blocks.layer(i).product, (f"V{i - 1}", f"U{i}")
        old = blocks[f"W{i}"]
        fit = Formula(fitted_weight, (product,))
        blocks.set(f"W{i}", fit, *around, f"b{i}", f"W{i}", self.rho, self.alpha)
        weight = old if self.old_weight else blocks[f"W{i}"]
        blocks.set(f"b{i}", Formula(fitted_bias, (product,)), *around, weight, f"b{i}", self.rho, self.alpha)


@dataclass(frozen=True)
class TwoSplitSweep(Sweep):
    """Lowers the objective over V_i, W_i and b_i of each layer in turn, the last one first.

    F = R(V_N, y) + sum_i gamma / 2 ||V_i - sigma_i(W_i V_(i-1) + b_i)||^2, plus alpha / 2 ||. - its old
    value||^2 for each of them. V_N has a closed form, and so have W_N and b_N where the output is linear; the
    others are nonlinear least squares, for which some Gauss-Newton steps stand that never rise.
    """

    steps: int = 3

    def _activation(self, blocks: Blocks, i: int) -> None:
        layer = blocks.layer(i)
        compute = Formula(bent_product, (layer.product, layer.bend))
        below = blocks.run(layer.owner, compute, f"V{i - 1}", f"W{i}", f"b{i}", name="sent")
        if i == blocks.last:
            center = blocks.run(layer.owner, mean_of, below, self.gamma, f"V{i}", self.alpha, name="center")
            blocks.set_output(f"V{i}", self.output, center, self.gamma + self.alpha)
            return
        above = blocks.layer(i + 1)
        descend = Formula(descended_input, (above.product, above.bend, self.steps, self.rounds))
        around = (f"V{i}", below, f"V{i + 1}", f"W{i + 1}", f"b{i + 1}")
        blocks.set(f"V{i}", descend, *around, self.gamma, self.alpha)

    def _weights(self, blocks: Blocks, i: int) -> None:
        layer, around = blocks.layer(i), (f"V{i - 1}", f"V{i}")
        if layer.bend.function is None:
            fits = (Formula(fitted_weight, (layer.product,)), Formula(fitted_bias, (layer.product,)))
        else:
            given = (layer.product, layer.bend, self.steps)
            fits = (Formula(descended_weight, given), Formula(descended_bias, given))
        blocks.set(f"W{i}", fits[0], *around, f"b{i}", f"W{i}", self.gamma, self.alpha)
        blocks.set(f"b{i}", fits[1], *around, f"W{i}", f"b{i}", self.gamma, self.alpha)


@dataclass(frozen=True)
class BCD3(BlockMethod):
    """Block coordinate descent with products and activations as variables: every block in closed form.

    A step is one sweep from the output down; what follows is sums over samples, as published (see
    `ThreeSplitSweep`). The objective never rises while the batch stays the same. The authors start from
    weights N(0, 0.01^2) and biases 0.1, with alpha = 5, and alpha = 1 for ten layers; their code sets b by
    the old W (`old_weight`), which is no minimum. A nonlinearity other than ReLU and LeakyReLU has its U by
    an inner search, and what a convolution or a pooling reads by conjugate gradients.

    The user's loss is reported and trains nothing; `output` is what does. The variables live on while a step
    gets the same batch, in the same order, as the one before (full-batch training; `shuffle=False`).
    On another batch they start anew by a forward pass, and alpha keeps W and b near.
    """

    reference: ClassVar[str] = "Zeng, Lau, Lin & Yao 2019, three-splitting"

    gamma: float = option(1.0, "weight of the nonlinearities' constraint", range=(0.01, 10.0), scale="log")
    rho: float = option(1.0, "weight of the products' constraint", range=(0.01, 10.0), scale="log")
    alpha: float = option(5.0, "how far blocks stay where they were", range=(0.1, 100.0), scale="log")
    sweeps: int = option(1, "sweeps over all blocks in a step", range=(1, 10))
    output: str = option("squared", "loss at the output, in the place of the user's", choices=OUTPUTS)
    old_weight: bool = option(False, "set b by the old W, as the released code does")
    rounds: int = option(10, "conjugate-gradient rounds for what a convolution reads", range=(1, 50))

    def __post_init__(self) -> None:
        check(self, ("gamma", "rho", "alpha"), ("sweeps", "rounds"))

    def passes(self) -> Sequence[Pass]:
        """Return the sweep."""
        return (ThreeSplitSweep(**vars(self)),)


@dataclass(frozen=True)
class BCD2(BlockMethod):
    """Block coordinate descent with activations as variables: nonlinear least squares by inner steps.

    A step is one sweep from the output down (see `TwoSplitSweep`). The paper leaves the inner solver open;
    here it is Gauss-Newton with one Cholesky factor for a block, shortened until the objective does not rise.

    The user's loss is reported and trains nothing; `output` is what does. The variables live on while a step
    gets the same batch, in the same order, as the one before (full-batch training; `shuffle=False`).
    On another batch they start anew by a forward pass, and alpha keeps W and b near.
    """

    reference: ClassVar[str] = "Zeng, Lau, Lin & Yao 2019, two-splitting"

    gamma: float = option(1.0, "weight of the nonlinearities' constraint", range=(0.01, 10.0), scale="log")
    alpha: float = option(5.0, "how far blocks stay where they were", range=(0.1, 100.0), scale="log")
    sweeps: int = option(1, "sweeps over all blocks in a step", range=(1, 10))
    steps: int = option(3, "inner steps on a block", range=(1, 20))
    output: str = option("squared", "loss at the output, in the place of the user's", choices=OUTPUTS)
    rounds: int = option(10, "conjugate-gradient rounds for what a convolution reads", range=(1, 50))

    def __post_init__(self) -> None:
        check(self, ("gamma", "alpha"), ("sweeps", "steps", "rounds"))

    def passes(self) -> Sequence[Pass]:
        """Return the sweep."""
        return (TwoSplitSweep(**vars(self)),)
