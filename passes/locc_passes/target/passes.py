"""The passes of target propagation: inverses, targets, and the turns in which they train."""

from __future__ import annotations

import operator
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
    judged,
    read_by,
    rows,
    squared_distance,
)

ORDERS = ("epoch", "batch")

FAILS = "reconstructs {how} of what the module reads"
REMEDY = "train inverses longer (order='epoch', a larger lr_scale), or lower sigma"


@dataclass(frozen=True)
class Inverses(Pass):
    """Gives each module but the first and the last an inverse g, an auxiliary owner that trains alone.

    g maps all the values that a module sends to each one that it reads from another module. Its objective
    is ||g(f(h + e)) - (h + e)||^2, e ~ N(0, sigma^2), summed over units and values, mean over the rows. The
    module itself runs f on h + e; both arrive detached, so the objective trains g only.
    """

    sigma: float = 0.3598
    lr_scale: float = 1.0
    maker: InverseMaker = field(default_factory=InverseMaker)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the inverses and their objectives."""
        for module in ir.modules[1:-1]:
            entries = read_by(ir, module.name)
            outputs = activations(ir, module.name)
            if entries and outputs:
                helper = ir.add_owner(f"{module.name}.inverse", module, self.lr_scale).name
                for boundary in entries:
                    network = self.maker.build(ir, boundary, outputs)
                    name = helper if len(entries) == 1 else f"{helper}.{boundary.value.name}"
                    boundary.entry.meta["inverse"] = (helper, ir.add_module(name, network))
                self._train(ir, module, helper, [b.entry for b in entries], outputs)

    def _train(
        self, ir: TrainingGraph, module: Owner, helper: str, entries: list[fx.Node], outputs: list[fx.Node]
    ) -> None:
        noisy = {entry: disturb(ir, module.name, entry, self.sigma) for entry in entries}
        results = ir.replay(module.name, noisy, outputs, "replay")
        inputs = [ir.stop_gradient(helper, r) for r in results]
        errors = []
        for entry in entries:
            wanted = ir.stop_gradient(helper, noisy[entry])
            path = entry.meta["inverse"][1]
            found = ir.call(helper, path, *inputs, role="inverse")
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
        targets: dict[fx.Node, fx.Node] = {}
        for module in reversed(ir.modules[:-1]):
            distances = []
            for value in activations(ir, module.name):
                targets[value] = self._target(ir, module.name, value, targets)
                fixed = targets[value]
                if fixed.target is not stop_gradient:
                    fixed = ir.stop_gradient(module.name, fixed)
                distance = ir.emit(module.name, squared_distance, value, fixed, rows(value), role="distance")
                distances.append(distance)
            if distances:
                ir.objective(module.name, add_all(ir, module.name, distances), "target")

    def _target(
        self, ir: TrainingGraph, owner: str, value: fx.Node, targets: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        here = ir.stop_gradient(owner, value)
        proposals = []
        total = here
        for boundary in ir.boundaries(producer=owner):
            if boundary.value is not value:
                continue
            start = total if self.difference else here
            if boundary.consumer == ir.last.name:
                found = self._descend(ir, owner, start, boundary.entry)
            elif "inverse" in boundary.entry.meta:
                found = self._invert(ir, owner, start, boundary.entry, targets)
            else:
                continue
            total = found
            proposals.append(found)
        if self.difference or len(proposals) < 2:
            return total
        joint = proposals[0]
        for proposal in proposals[1:]:
            joint = ir.emit(owner, operator.add, joint, proposal, role="target")
        return ir.emit(owner, operator.truediv, joint, len(proposals), role="target")

    def _descend(self, ir: TrainingGraph, owner: str, start: fx.Node, entry: fx.Node) -> fx.Node:
        gradient = ir.stop_gradient(owner, ir.gradient(ir.apply_loss(), entry))
        return ir.emit(owner, torch.sub, start, gradient, alpha=self.eta, role="target")

    def _invert(
        self, ir: TrainingGraph, owner: str, start: fx.Node, entry: fx.Node, targets: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        helper, path = entry.meta["inverse"]
        outputs = activations(ir, entry.meta["owner"])
        wanted = [ir.stop_gradient(helper, targets[v]) for v in outputs]
        proposed = ir.call(helper, path, *wanted, role="inverse")
        if not self.difference:
            return ir.stop_gradient(owner, proposed)
        actual = [ir.stop_gradient(helper, v) for v in outputs]
        undone = ir.call(helper, path, *actual, role="inverse")
        difference = ir.emit(helper, operator.sub, proposed, undone, role="difference")
        arriving = ir.stop_gradient(owner, difference)
        return ir.emit(owner, operator.add, start, arriving, role="target")


@dataclass(frozen=True)
class Turns(Pass):
    """Declares in which passes over the data inverses and forward weights train.

    "epoch": in each epoch one pass that updates only the inverses, then one that updates only the modules.
    "batch": both in every batch, each from the values before the batch.
    """

    order: str = "epoch"

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the phases."""
        inverses = tuple(name for name, owner in ir.owners.items() if owner.auxiliary and ir.objectives(name))
        if self.order == "epoch" and inverses:
            ir.phases = (Phase("inverses", inverses), Phase("forward", tuple(o.name for o in ir.modules)))
