"""`dladmm`: deep-learning ADMM, whose updates are gradient steps with a searched length, and no inverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from locc.ir import TensorSpec, TrainingGraph
from locc.rewrite import Pass, option, spec_of
from locc_passes.auxiliary_variables.admm import unlinear
from locc_passes.auxiliary_variables.blocks import BlockMethod, Blocks, Formula, check
from locc_passes.auxiliary_variables.formulas import OUTPUTS, affine, bent
from locc_passes.auxiliary_variables.layers import unlayered
from locc_passes.auxiliary_variables.products import Bend, Product

CAP, RISES = 0.1, 3


def majorised(curvature: Tensor, least: Tensor) -> Tensor:
    """Return the first of least, 2 least, 4 least, ... that is not below a curvature.

    With that weight, the quadratic around a point lies above a quadratic of this curvature along its slope.
    """
    return least * 2 ** torch.log2(curvature / least).ceil().clamp(min=0)


def _along(slope: Tensor, *images: Tensor) -> Tensor:
    """Return the sum of ||image||^2 per ||slope||^2."""
    size = slope.square().sum().clamp(min=torch.finfo(slope.dtype).tiny)
    return torch.stack([i.square().sum() for i in images]).sum() / size


def stepped_weight(
    product: Product, v: Tensor, z: Tensor, w: Tensor, b: Tensor | None, rho: Tensor, least: Tensor
) -> Tensor:
    """Return w after a gradient step on rho / 2 ||z - w v - b||^2."""
    x, rest = product.inputs(v), product.outputs(affine(product, v, w, b) - z)
    slope = rho * (rest.mT @ x)
    length = majorised(rho * _along(slope, x @ slope.mT), least)
    return w - (slope / length).reshape(w.shape)


def stepped_bias(product: Product, v: Tensor, z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return b after a step of length 1 / rho on the mean over the samples of rho / 2 ||z - w v - b||^2."""
    rest = affine(product, v, w, b) - z
    return b - product.total(rest) / (rest.numel() // len(b))


def stepped_input(
    product: Product,
    bend: Bend,
    a: Tensor,
    below: Tensor,
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    rho: Tensor,
    least: Tensor,
) -> Tensor:
    """Return a after a gradient step on rho / 2 (||z - w a - b||^2 + ||a - sigma(below)||^2)."""
    slope = rho * (product.adjoint(affine(product, a, w, b) - z, w, a) + a - bend(below))
    length = majorised(rho * _along(slope, product(slope, w), slope), least)
    return a - slope / length


def shifted(z: Tensor, multiplier: Tensor, rho: Tensor, sign: float) -> Tensor:
    """Return z + sign multiplier / rho."""
    return z + sign * multiplier / rho


def ascended(multiplier: Tensor, z: Tensor, m: Tensor, rho: Tensor) -> Tensor:
    """Return multiplier + rho (z - m)."""
    return multiplier + rho * (z - m)


def started(y: Tensor, output: Tensor) -> Tensor:
    """Return +1 for the class and -1 elsewhere."""
    return torch.where(y > 0.5, 1.0, -1.0).to(output.dtype)


def mean_cross_entropy(dim: int, y: Tensor, output: Tensor) -> Tensor:
    """Return the cross-entropy of softmax(output) with y, mean over samples."""
    return -(y * output.log_softmax(dim)).sum(dim).mean()


def risen(costs: Tensor, cost: Tensor, rho: Tensor) -> Tensor:
    """Return rho, ten times higher (up to `CAP`) after a cost that has risen three times in a row."""
    row = torch.cat([costs, cost[None]])
    rises = (row[1:] > row[:-1]).all() & row.isfinite().all()
    return torch.where(rises, torch.maximum(rho, (10 * rho).clamp(max=CAP)), rho)


def remembered(same: Tensor, costs: Tensor, cost: Tensor) -> Tensor:
    """Return the costs of the last steps with this one; none on another batch: that was before training."""
    return torch.where(same, torch.cat([costs[1:], cost[None]]), torch.inf)


def scaled(rho: Tensor, start: float) -> Tensor:
    """Return how often rho has grown since its start: the least weight of a step grows with it."""
    return rho / start


@dataclass(frozen=True)
class DownAndUp(Pass):
    """Sets every block once on the way down (z, b, W, a of each layer) and once on the way up (W, b, z, a).

    L = CE(z_L, y) + <u, z_L - W_L a_(L-1) - b_L> + rho / 2 sum over l of ||z_l - W_l a_(l-1) - b_l||^2
        + rho / 2 sum over l < L of ||a_l - sigma(z_l)||^2. Then u += rho (z_L - W_L a_(L-1) - b_L).
    """

    rho: float = 1e-6
    sweeps: int = 1
    output: str = "cross_entropy"

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse networks that are no chain of layers, and those that end in a nonlinearity."""
        yield from unlayered(ir)
        yield from unlinear(ir)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the sweeps; the user's loss is only reported."""
        ir.apply_loss()
        blocks = Blocks(ir, "z", "a")
        last = blocks.last
        for i, layer in enumerate(blocks.layers[:-1], start=1):
            blocks.begin(f"z{i}", layer.pre)
            blocks.begin(f"a{i}", layer.post)
        owner, end = blocks.layer(last).owner, blocks.layer(last).pre
        start = blocks.run(owner, started, blocks.labels, end, name=f"z{last}")
        blocks.begin(f"z{last}", start)
        blocks.begin(f"u{last}", 0.0, spec_of(end))
        self._weight(blocks)
        for _ in range(self.sweeps):
            for i in range(last, 0, -1):
                for step in (self._product, self._bias, self._matrix, self._input):
                    step(blocks, i)
            for i in range(1, last + 1):
                for step in (self._matrix, self._bias, self._product):
                    step(blocks, i)
                if i < last:
                    self._input(blocks, i + 1)
            m = self._forward(blocks, last)
            blocks.set(f"u{last}", ascended, f"u{last}", f"z{last}", m, f"r{last}")
        blocks.finish()

    def _weight(self, blocks: Blocks) -> None:
        """Set rho, and l, the least weight of a step: both grow tenfold where the cost keeps rising."""
        ir, last = blocks.ir, blocks.last
        blocks.begin(f"r{last}", self.rho, ir.scalar)
        blocks.begin(f"c{last}", float("inf"), TensorSpec((RISES,), ir.scalar.dtype))
        owner, mean = blocks.layer(last).owner, Formula(mean_cross_entropy, (blocks.class_dim,))
        cost = blocks.run(owner, mean, blocks.labels, blocks.layer(last).pre, name="cost")
        blocks.set(f"r{last}", risen, f"c{last}", cost, f"r{last}")
        blocks.set(f"c{last}", remembered, blocks.same, f"c{last}", cost)
        blocks.values[f"l{last}"] = blocks.run(owner, scaled, f"r{last}", self.rho, name="least")

    @staticmethod
    def _forward(blocks: Blocks, i: int) -> fx.Node:
        """Return W_i a_(i-1) + b_i."""
        product = Formula(affine, (blocks.layer(i).product,))
        return blocks.run(blocks.layer(i).owner, product, f"a{i - 1}", f"W{i}", f"b{i}", name="product")

    @staticmethod
    def _aim(blocks: Blocks, i: int) -> str | fx.Node:
        """Return what W_i a_(i-1) + b_i should be: z_i, and at the output z_i + u / rho."""
        if i < blocks.last:
            return f"z{i}"
        return blocks.run(blocks.layer(i).owner, shifted, f"z{i}", f"u{i}", f"r{i}", 1.0, name="aim")

    def _product(self, blocks: Blocks, i: int) -> None:
        """Set z_i."""
        layer, m = blocks.layer(i), self._forward(blocks, i)
        if i < blocks.last:
            blocks.set(f"z{i}", Formula(bent, (layer.bend,)), f"a{i}", m, 1.0, f"z{i}")
            return
        center = blocks.run(layer.owner, shifted, m, f"u{i}", f"r{i}", -1.0, name="center")
        blocks.set_output(f"z{i}", self.output, center, f"r{i}")

    def _bias(self, blocks: Blocks, i: int) -> None:
        step = Formula(stepped_bias, (blocks.layer(i).product,))
        blocks.set(f"b{i}", step, f"a{i - 1}", self._aim(blocks, i), f"W{i}", f"b{i}")

    def _matrix(self, blocks: Blocks, i: int) -> None:
        step = Formula(stepped_weight, (blocks.layer(i).product,))
        around = (f"a{i - 1}", self._aim(blocks, i), f"W{i}", f"b{i}")
        blocks.set(f"W{i}", step, *around, f"r{blocks.last}", f"l{blocks.last}")

    def _input(self, blocks: Blocks, i: int) -> None:
        """Set a_(i-1), what layer i reads; the first one reads the data."""
        if i == 1:
            return
        step = Formula(stepped_input, (blocks.layer(i).product, blocks.layer(i - 1).bend))
        around = (f"a{i - 1}", f"z{i - 1}", self._aim(blocks, i), f"W{i}", f"b{i}")
        blocks.set(f"a{i - 1}", step, *around, f"r{blocks.last}", f"l{blocks.last}")


@dataclass(frozen=True)
class DLADMM(BlockMethod):
    """Alternating directions without inverses: gradient steps down and up the network.

    A step goes down and up once (see `DownAndUp`). The step of W and of a is 1 / t, t the first of 1, 2, 4,
    ... at which the quadratic majoriser holds; z_L is found by FISTA. rho grows tenfold, up to 0.1, when the
    network's cross-entropy on the same batch has risen three times in a row, and the least t grows with it.
    The authors start at rho = 1e-6 from weights N(0, 0.1^2), on 60,000 samples at once: t is about rho times
    their number, so on small batches in float32 such a step moves nothing, and the default is their last
    value. Hidden layers have no multiplier.

    The user's loss is reported and trains nothing; `output` is what does. The variables live on while a step
    gets the same batch, in the same order, as the one before (full-batch training; `shuffle=False`).
    On another batch they start anew by a forward pass, z_L at +1 for the class and -1 elsewhere.
    """

    reference: ClassVar[str] = "Wang, Yu, Chen & Zhao 2019, dlADMM"

    rho: float = option(0.1, "weight of every constraint", range=(1e-6, 1.0), scale="log")
    sweeps: int = option(1, "times down and up in a step", range=(1, 10))
    output: str = option("cross_entropy", "loss at the output, in the place of the user's", choices=OUTPUTS)

    def __post_init__(self) -> None:
        check(self, ("rho",), ("sweeps",))

    def passes(self) -> Sequence[Pass]:
        """Return the sweep."""
        return (DownAndUp(self.rho, self.sweeps, self.output),)
