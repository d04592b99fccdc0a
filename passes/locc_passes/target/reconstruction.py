"""The difference reconstruction loss of Meulemans et al. 2020, and maps straight from the output."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from locc.ir import Owner, TensorSpec, TrainingGraph, tape_of
from locc.nn import Layout, guess_layout
from locc.rewrite import (
    InverseMaker,
    Pass,
    UndefinedError,
    activations,
    add_all,
    build,
    draw,
    output_layout,
    prediction_spec,
    weigh,
)
from locc_passes.target.returns import Moved, Return, difference, lift, returns


@dataclass(frozen=True)
class DifferenceReconstruction(Pass):
    """Trains returns to undo, at the output, what noise on a module's values does there.

    The values h that a module sends are disturbed by e ~ N(0, sigma^2) and run forward to the output; that
    comes back down by the differences of the returns above, which are constants here. A return g of h has the
    objective mean (g(moved) - g(now) - e)^2 / sigma^2, the mean over all elements; where a value has several
    returns, their sum takes the place of the difference, and each learns its own part.
    """

    sigma: float

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add one disturbed forward pass for each module but the last, and the objectives."""
        errors: dict[str, list[fx.Node]] = {}
        for module in ir.modules[:-1]:
            noise = {v: draw(ir, module.name, v, self.sigma) for v in activations(ir, module.name)}
            if not noise:
                continue
            moved: Moved = {ir.prediction: run_on(ir, module, noise)}
            for value, e in noise.items():
                for back in returns(value):
                    errors.setdefault(back.owner, []).append(self._error(ir, value, back, e, moved))
        for helper, terms in errors.items():
            ir.objective(helper, add_all(ir, helper, terms), "reconstruction")

    def _error(self, ir: TrainingGraph, value: fx.Node, back: Return, e: fx.Node, moved: Moved) -> fx.Node:
        total = difference(ir, back, moved)
        for other in returns(value):
            if other is not back:
                constant = ir.stop_gradient(back.owner, difference(ir, other, moved))
                total = ir.emit(back.owner, operator.add, total, constant, role="undone")
        wanted = ir.stop_gradient(back.owner, e)
        error = ir.emit(back.owner, F.mse_loss, total, wanted, role="reconstruction")
        return weigh(ir, error, self.sigma**-2)


def run_on(ir: TrainingGraph, module: Owner, added: Moved) -> fx.Node:
    """Return the prediction after something is added to values that a module sends; no gradient runs back.

    Raises:
        UndefinedError: the prediction does not depend on them.
    """
    moved: Moved = {}
    for value, e in added.items():
        here = ir.stop_gradient(module.name, value)
        moved[value] = ir.emit(module.name, operator.add, here, e, role="disturbed")
    for reader in ir.modules[module.index + 1 :]:
        entries = {b.entry: b.value for b in ir.boundaries(consumer=reader.name) if b.value in moved}
        sent = [ir.prediction] if reader is ir.last else activations(ir, reader.name)
        tapes = {value: entries.keys() & tape_of(value) for value in sent}
        reached = [value for value in sent if tapes[value]]
        if reached:
            read = set().union(*tapes.values())
            fed = {n: ir.stop_gradient(reader.name, moved[v]) for n, v in entries.items() if n in read}
            moved.update(zip(reached, ir.replay(reader.name, fed, reached, "disturbed"), strict=True))
    if ir.prediction not in moved:
        raise UndefinedError(
            f"the prediction '{ir.prediction.name}' is not computed from what module '{module.name}' sends, "
            "so that no target comes back to it; let it be one module with a neighbour that leads there"
        )
    return moved[ir.prediction]


@dataclass(frozen=True)
class DirectReturns(Pass):
    """Gives each value that a module but the last sends a map G from the prediction, which trains alone.

    With `hidden`, the maps of all modules but the last hidden one read tanh(R a + r) in the place of the
    prediction a: R and r are random, the same for all, never trained, and computed once by the last module.
    """

    lr_scale: float = 1.0
    maker: InverseMaker = field(default_factory=InverseMaker)
    hidden: int | None = None

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the random layer and the maps."""
        *below, nearest = ir.modules[:-1] or [ir.last]
        source = self._lifted(ir, self.hidden) if self.hidden and below else ir.prediction
        for module in ir.modules[:-1]:
            read = ir.prediction if module is nearest else source
            values = activations(ir, module.name)
            if values:
                helper = ir.add_owner(f"{module.name}.feedback", module, self.lr_scale).name
                for value in values:
                    network = self.maker.build(ir, module.name, value, [read])
                    name = helper if len(values) == 1 else f"{helper}.{value.name}"
                    returns(value).append(Return(helper, ir.add_module(name, network), (read,)))

    def _lifted(self, ir: TrainingGraph, width: int) -> fx.Node:
        def make(output: TensorSpec, _: TensorSpec) -> nn.Module:
            return RandomLayer(output, width, guess_layout(output, output_layout(ir)))

        network = build(make, ir.last.name, prediction_spec(ir), prediction_spec(ir))
        return lift(ir, ir.prediction, ir.add_module("hidden_feedback", network))


class RandomLayer(nn.Module):
    """tanh(R a + r) along the channels of a value, with R and r ~ U(+-1/sqrt(channels)) in buffers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, spec: TensorSpec, width: int, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        channels = layout.channels(spec)
        bound = 1 / math.sqrt(channels)
        for name, shape in (("weight", (width, channels)), ("bias", (width,))):
            self.register_buffer(name, torch.empty(shape, dtype=spec.dtype).uniform_(-bound, bound))

    def forward(self, a: Tensor) -> Tensor:
        """Map a value with the channels of the spec to one with `width` channels."""
        rows = F.linear(self.layout.last(a), self.weight, self.bias)
        return self.layout.from_last(torch.tanh(rows))
