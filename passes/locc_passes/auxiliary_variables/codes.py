"""Codes: the outputs of modules as variables, moved by inner gradient steps before the weights learn."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from locc.ir import Boundary, TensorSpec, TrainingGraph, carry, stop_gradient
from locc.rewrite import Pass, advised, has_rows, learned


def mean_abs(x: Tensor) -> Tensor:
    """Return mean |x|, shape []."""
    return x.abs().mean()


def still(x: Tensor) -> Tensor:
    """Return zeros like `x`: the momentum before the first inner step."""
    return torch.zeros_like(x)


def nesterov_momentum(momentum: Tensor, slope: Tensor, factor: float) -> Tensor:
    """Return the momentum after a step: factor * momentum + slope."""
    return factor * momentum + slope


def nesterov_step(code: Tensor, slope: Tensor, momentum: Tensor, rate: float, factor: float) -> Tensor:
    """Return the code after a step of Nesterov's SGD, as `torch.optim.SGD` takes it."""
    return code - rate * (slope + factor * momentum)


@dataclass(frozen=True)
class InnerSteps(Pass):
    """Moves the codes of each module, the last ones first, by some steps of Nesterov's SGD.

    The codes c are the values that a module sends on, and start at the forward value c0. Their energy
    is that of the module f that reads them, with its weights of before the update:
      * f the last module: loss(f(c), y) / mu + mean (c - c0)^2
      * otherwise: mean (f(c) - sg c')^2 + mean (c - c0)^2, with c' the codes of f after their own steps
    and lambda_c / mu * mean |c| in both. A region in f's program, since it needs f's backward pass.
    """

    steps: int = 5
    rate: float = 0.3
    momentum: float = 0.9
    mu: float = 0.003
    mu_step: float = 0.0
    lambda_c: float = 0.0

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse values that skip modules: their codes would have two energies to obey at once."""
        order = {module.name: module.index for module in ir.modules}
        for boundary in coded(ir):
            if not has_rows(boundary.value):
                yield (
                    f"'{boundary.value.name}' is no activation but a parameter of module "
                    f"'{boundary.producer}', or made of some, and '{boundary.consumer}' uses it; a code "
                    "cannot stand for it: compile with tied='copy', or split elsewhere"
                )
            elif order[boundary.consumer] != order[boundary.producer] + 1:
                yield (
                    f"'{boundary.value.name}' skips from module '{boundary.producer}' to "
                    f"'{boundary.consumer}', and a code belongs between neighbours; split where no skip "
                    "connection crosses"
                )
        if any(order[b.consumer] != order[b.producer] + 1 for b in coded(ir)):
            yield from advised(ir)
        for before, module in itertools.pairwise(ir.modules):
            if not coded(ir, before.name, module.name):
                yield f"module '{before.name}' sends no activation to '{module.name}'; leave its split out"

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add one region for each module but the first, from the last one down."""
        if len(ir.modules) == 1:
            return
        weight = self._weight(ir)
        for before, module in reversed(list(itertools.pairwise(ir.modules))):
            entries = coded(ir, before.name, module.name)
            self._region(ir, module.name, f"codes_{before.name}", entries, weight)

    def _weight(self, ir: TrainingGraph) -> float | fx.Node:
        """Return mu: a number, or a state that grows by `mu_step` a batch up to ten times its start."""
        if not self.mu_step:
            return self.mu
        owner = ir.last.name
        state = ir.state(owner, "mu", ir.scalar, self.mu)
        ir.assign(owner, state, ir.emit(owner, grow, state, self.mu_step, 10 * self.mu, role="state"))
        return state

    def _region(
        self, ir: TrainingGraph, owner: str, name: str, entries: list[Boundary], weight: float | fx.Node
    ) -> None:
        targets = [ir.stop_gradient(owner, code_of(b)) for b in coded(ir, owner)]
        mu = weight
        if isinstance(weight, fx.Node) and (owner == ir.last.name or self.lambda_c):
            mu = ir.stop_gradient(owner, weight)
        resting = [ir.emit(owner, still, b.entry, role="rest") for b in entries]
        with ir.repeat(name, self.steps) as carried:
            codes = [ir.emit(owner, carry, b.entry, role="moving") for b in entries]
            momenta = [ir.emit(owner, carry, m, role="momentum") for m in resting]
            leaves = [ir.emit(owner, stop_gradient, c, role="leaf") for c in codes]
            energy = self._energy(ir, owner, entries, leaves, targets, mu)
            for boundary, code, momentum, leaf in zip(entries, codes, momenta, leaves, strict=True):
                slope = ir.gradient(energy, leaf)
                after = ir.emit(owner, nesterov_momentum, momentum, slope, self.momentum, role="momentum")
                rates = (self.rate, self.momentum)
                moved = ir.emit(owner, nesterov_step, code, slope, after, *rates, role="code")
                boundary.entry.meta["code"] = moved
                carried += [(code, moved), (momentum, after)]

    def _energy(
        self,
        ir: TrainingGraph,
        owner: str,
        entries: list[Boundary],
        leaves: list[fx.Node],
        targets: list[fx.Node],
        mu: float | fx.Node,
    ) -> fx.Node:
        moved = {b.entry: leaf for b, leaf in zip(entries, leaves, strict=True)}

        def scalar(function: Callable[..., object], *args: object) -> fx.Node:
            return ir.emit(owner, function, *args, role="energy")

        if owner == ir.last.name:
            (output,) = ir.replay(owner, moved, [ir.output], role="replay", moves=True)
            terms = [scalar(operator.truediv, ir.loss_of(owner, output, "energy"), mu)]
        else:
            found = ir.replay(owner, moved, [b.value for b in coded(ir, owner)], role="replay", moves=True)
            terms = [scalar(functional.mse_loss, f, t) for f, t in zip(found, targets, strict=True)]
        terms += [scalar(functional.mse_loss, leaf, b.entry) for b, leaf in zip(entries, leaves, strict=True)]
        if self.lambda_c:
            for leaf in leaves:
                sparse = scalar(operator.mul, scalar(mean_abs, leaf), self.lambda_c)
                terms.append(scalar(operator.truediv, sparse, mu))
        total = terms[0]
        for term in terms[1:]:
            total = scalar(operator.add, total, term)
        return total


def coded(ir: TrainingGraph, producer: str | None = None, consumer: str | None = None) -> list[Boundary]:
    """Return the boundaries that carry codes.

    Left out are integers, values that no parameter influences, and values that the batch's samples share
    (rotary tables, whose module is handed an activation for its dtype): they enter as they are.
    """
    above = learned(ir, frozen=True)
    found = [b for b in ir.boundaries(producer, consumer) if b.differentiable and b.value in above]
    return [b for b in found if has_rows(b.value) or not _reads_rows(b.value)]


def _reads_rows(node: fx.Node) -> bool:
    """Whether a value is computed from one that has a row for each sample."""
    for source in node.all_input_nodes:
        spec = source.meta.get("spec")
        if (isinstance(spec, TensorSpec) and spec.batch_dim is not None) or _reads_rows(source):
            return True
    return False


def code_of(boundary: Boundary) -> fx.Node:
    """Return the code of a boundary value after its inner steps; it belongs to the consumer."""
    code = boundary.entry.meta["code"]
    assert isinstance(code, fx.Node)
    return code


def grow(mu: Tensor, step: float, cap: float) -> Tensor:
    """Return mu + step, at most `cap`."""
    return (mu + step).clamp(max=cap)
