"""The passes of target propagation: inverses, targets, and the turns in which they train."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from locc.ir import Owner, Phase, TrainingGraph, stop_gradient
from locc.rewrite import (
    InverseMaker,
    Pass,
    activations,
    add_all,
    disturb,
    divided,
    judged,
    output_error,
    read_by,
    rows,
    squared_distance,
    trained,
)
from locc_passes.target.returns import Moved, Return, brought, proposal, returns

ORDERS = ("epoch", "batch")

FAILS = "reconstructs {how} of what the module reads"
REMEDY = "train inverses longer (order='epoch', a larger lr_scale), or lower sigma"


@dataclass(frozen=True)
class Inverses(Pass):
    """Gives each module but the first an inverse g, an auxiliary owner that trains alone.

    g maps all the values that a module sends (the last: the prediction) to each one that it reads from
    another module. The last module has one only if `last`.
    """

    lr_scale: float = 1.0
    maker: InverseMaker = field(default_factory=InverseMaker)
    last: bool = False

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the inverses."""
        for module in ir.modules[1:]:
            final = module is ir.last
            entries = read_by(ir, module.name)
            outputs = [ir.prediction] if final else activations(ir, module.name)
            if entries and outputs and (self.last or not final):
                helper = ir.add_owner(f"{module.name}.inverse", module, self.lr_scale).name
                for boundary in entries:
                    network = self.maker.build(ir, module.name, boundary.value, outputs)
                    name = helper if len(entries) == 1 else f"{helper}.{boundary.value.name}"
                    path = ir.add_module(name, network)
                    returns(boundary.value).append(Return(helper, path, tuple(outputs)))


@dataclass(frozen=True)
class Reconstruction(Pass):
    """Gives inverses the objective ||g(f(h + e)) - (h + e)||^2, e ~ N(0, sigma^2).

    Summed over units and values, mean over the rows. The module itself runs f on h + e; both arrive detached,
    so the objective trains g only.
    """

    sigma: float = 0.3598

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the objectives."""
        for module in ir.modules[1:-1]:
            helper = f"{module.name}.inverse"
            entries = {
                b.entry: back
                for b in read_by(ir, module.name)
                for back in returns(b.value)
                if back.owner == helper
            }
            if entries:
                self._train(ir, module, helper, entries)

    def _train(self, ir: TrainingGraph, module: Owner, helper: str, entries: dict[fx.Node, Return]) -> None:
        noisy = {entry: disturb(ir, module.name, entry, self.sigma) for entry in entries}
        results = ir.replay(module.name, noisy, activations(ir, module.name), "replay")
        errors = []
        for entry, back in entries.items():
            found = back.call(ir, tuple(results))
            wanted = ir.stop_gradient(helper, noisy[entry])
            error = ir.emit(helper, squared_distance, found, wanted, rows(entry), role="reconstruction")
            errors.append(judged(error, FAILS, REMEDY))
        ir.objective(helper, add_all(ir, helper, errors), "reconstruction")


@dataclass(frozen=True)
class Targets(Pass):
    """Gives each module but the last the objective ||h - sg target||^2: sum over units, mean over rows.

    What the last module reads gets the target h - eta dL/dh. What another module r reads gets
    h + g_r(target of r's outputs) - g_r(r's outputs), or without `difference` g_r(target of r's outputs).
    A value with several readers gets the sum of their differences, as a gradient is the sum of the readers'
    gradients; without `difference`, the mean of their targets. A module that sends several values has
    the sum of their distances as its objective.
    """

    eta: float = 0.3277
    difference: bool = True

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add targets and objectives, from the last module but one down to the first."""
        moved: Moved = {}
        for module in reversed(ir.modules[:-1]):
            values = activations(ir, module.name)
            for value in values:
                moved[value] = self._target(ir, value, moved)
            approach(ir, module.name, values, moved)

    def _target(self, ir: TrainingGraph, value: fx.Node, moved: Moved) -> fx.Node:
        owner = value.meta["owner"]
        entries = [b.entry for b in ir.boundaries(owner, ir.last.name) if b.value is value]
        if self.difference:
            total = brought(ir, value, moved)
            for entry in entries:
                total = self._descend(ir, owner, total, entry)
            return total
        here = ir.stop_gradient(owner, value)
        proposals = [ir.stop_gradient(owner, proposal(ir, back, moved)) for back in returns(value)]
        proposals += [self._descend(ir, owner, here, entry) for entry in entries]
        if not proposals:
            return here
        joint = proposals[0]
        for other in proposals[1:]:
            joint = ir.emit(owner, operator.add, joint, other, role="target")
        return (
            ir.emit(owner, operator.truediv, joint, len(proposals), role="target") if proposals[1:] else joint
        )

    def _descend(self, ir: TrainingGraph, owner: str, start: fx.Node, entry: fx.Node) -> fx.Node:
        gradient = ir.stop_gradient(owner, ir.gradient(ir.apply_loss(), entry))
        return ir.emit(owner, torch.sub, start, gradient, alpha=self.eta, role="target")


@dataclass(frozen=True)
class OutputTargets(Pass):
    """Gives every module the objective ||h - sg target||^2: sum over units, mean over rows.

    The prediction a gets the target a - eta dL/da; a value that a module sends gets h + the sum, over its
    returns g, of g(target of what g reads) - g(what g reads). A single module has nobody to set a target for,
    and trains on the loss.
    """

    eta: float

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse predictions that have no rows to set a target for."""
        yield from divided(ir)
        spec = ir.prediction.meta["spec"]
        if len(ir.modules) > 1 and (spec.batch_dim is None or not spec.differentiable):
            yield f"it predicts {spec}, and a target is set for one row of numbers per sample"

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add targets and objectives, from the output down to the first module."""
        last = ir.last.name
        if len(ir.modules) == 1:
            ir.objective(last, ir.apply_loss(), "loss")
            return
        here = ir.stop_gradient(last, ir.prediction)
        moved = {
            ir.prediction: ir.emit(last, torch.sub, here, output_error(ir), alpha=self.eta, role="target")
        }
        approach(ir, last, [ir.prediction], moved)
        for module in reversed(ir.modules[:-1]):
            approach(ir, module.name, activations(ir, module.name), moved)


def approach(ir: TrainingGraph, owner: str, values: list[fx.Node], moved: Moved) -> None:
    """Give a module the objective ||h - sg target||^2, summed over some of its values."""
    distances = []
    for value in values:
        fixed = brought(ir, value, moved)
        if fixed.target is not stop_gradient:
            fixed = ir.stop_gradient(owner, fixed)
        distances.append(ir.emit(owner, squared_distance, value, fixed, rows(value), role="distance"))
    # What reads a frozen head alone has a target, for those below, and nothing to train.
    if distances and (ir.frozen(owner) or any(trained(ir, value) for value in values)):
        ir.objective(owner, add_all(ir, owner, distances), "target")


@dataclass(frozen=True)
class Turns(Pass):
    """Declares in which passes over the data returns and forward weights train.

    "epoch": in each epoch one pass that updates only the inverses, then one that updates only the modules.
    "batch": both in every batch, each from the values before the batch; before the first epoch `warmup`
    passes for the returns alone, and `extra` ones at the end of each epoch.
    """

    order: str = "epoch"
    warmup: int = 0
    extra: int = 0

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the phases."""
        modules = tuple(o.name for o in ir.modules)
        feedback = tuple(name for name, owner in ir.owners.items() if owner.auxiliary and ir.objectives(name))
        if not feedback:
            return
        if self.order == "epoch":
            ir.phases = (Phase("inverses", feedback), Phase("forward", modules))
        elif self.warmup or self.extra:
            before = (Phase("warmup", feedback, self.warmup, warmup=True),) if self.warmup else ()
            after = (Phase("feedback", feedback, self.extra),) if self.extra else ()
            ir.phases = (*before, Phase("train", (*modules, *feedback)), *after)
