"""Recurrent networks on chunks of long sequences: state is carried, the gradient behind a chunk predicted."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, fx, nn

from locc.ir import Rebuild, TensorSpec, TrainingGraph, inner, tape_of
from locc.nn import Factory, build_synthesiser, check_shapes
from locc.rewrite import (
    Pass,
    add_all,
    build,
    build_custom,
    has_rows,
    judged,
    prediction_spec,
    rows,
    spec_of,
    squared_distance,
)
from locc_passes.synthetic.passes import FAILS, of_batch, of_sample

REMEDY = "lower the modules' learning rate against its own (lr_scale), or what it injects (carry_scale)"


@dataclass(frozen=True)
class CarriedState(Pass):
    """Carries states from one step to the next, and predicts as s(h) the gradient behind the end of a chunk.

    In training, the inputs `names` are what the model's last outputs, in the same order, were in the step
    before; both are of one module. With h its states, joined [B,n] (an LSTM's h and c): the module gets the
    objective scale <h_T, sg s(sg h_T)>, and s, the auxiliary `<module>.carried`, ||s(sg h_0) - sg d||^2,
    summed over units, mean over the rows. d is the gradient of the module's objectives with respect to h_0,
    for one sample's loss: that of this chunk's loss, and of its own injected part.
    """

    names: tuple[str, ...]
    scale: float = 0.1
    width: int | None = None
    lr_scale: float = 1.0
    mean: bool = True
    factory: Factory | None = None

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Each state comes back: its module computes one of the last outputs, of the same shape."""
        inputs, ends = {n.name: n for n in ir.inputs}, self._ends(ir)
        for name, end in zip(self.names, ends, strict=False):
            if name not in inputs:
                yield f"carry names '{name}', and the model's inputs are {', '.join(map(repr, inputs))}"
            elif not has_rows(inputs[name]):
                yield f"'{name}', {spec_of(inputs[name])}, has no batch dimension; take a state as [B,...]"
            elif not self._comes_back(inputs[name], end):
                yield (
                    f"'{name}', {spec_of(inputs[name])}, is carried, and the model's output in its place is "
                    f"'{end.name}', {end.meta['spec']}, of module '{end.meta['owner']}'; return the next "
                    "states last, in the order of carry, from the module that reads them"
                )
        if len(ends) < len(self.names):
            yield f"carry names {len(self.names)} states, and the model returns {len(ends)} values in all"

    @staticmethod
    def _comes_back(start: fx.Node, end: fx.Node) -> bool:
        reading = {u.meta["owner"] for u in start.users}
        alike = start.meta["spec"] == end.meta["spec"] and spec_of(start).differentiable
        return alike and reading == {end.meta["owner"]}

    def _ends(self, ir: TrainingGraph) -> list[fx.Node]:
        whole = ir.output.args if isinstance(ir.output.target, Rebuild) else (ir.output,)
        values = [v for v in whole if isinstance(v, fx.Node)][-len(self.names) :]
        return [v.all_input_nodes[0] if v.meta["role"] == "boundary" else v for v in values]

    def rewrite(self, ir: TrainingGraph) -> None:
        """Carry the states, and predict for each module that has some."""
        inputs = {n.name: n for n in ir.inputs}
        pairs: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
        for name, end in zip(self.names, self._ends(ir), strict=True):
            owner = str(end.meta["owner"])
            held = ir.state(owner, f"{name}_carried", spec_of(end))
            ir.assign(owner, held, end)
            start = ir.stop_gradient(owner, held, role="carried")
            ir.feed(owner, inputs[name], start)
            pairs.setdefault(owner, []).append((start, end))
        for owner, found in pairs.items():
            starts, ends = (list(nodes) for nodes in zip(*found, strict=True))
            self._predict(ir, owner, starts, ends)

    def _predict(self, ir: TrainingGraph, owner: str, starts: list[fx.Node], ends: list[fx.Node]) -> None:
        """Add the synthesiser, the objective at the end of the chunk, and the regression at its start."""
        helper = ir.add_owner(f"{owner}.carried", ir.owners[owner], self.lr_scale).name
        final = self._joined(ir, helper, ends)
        path = ir.add_module(helper, self._network(ir, owner, spec_of(final)))
        ahead = ir.call(helper, path, final, role="synthetic", spec=spec_of(final))
        arriving = ir.stop_gradient(owner, ahead)
        if self.mean:
            arriving = ir.emit(owner, of_batch, arriving, 0, role="synthetic")
        arriving = ir.emit(owner, torch.mul, arriving, self.scale, role="synthetic")
        terms, first = [], 0
        for end in ends:
            sizes = spec_of(end).features
            part = ir.emit(owner, separated, arriving, first, sizes, rows(end), role="synthetic")
            terms.append(ir.emit(owner, inner, end, part, role="chain"))
            first += math.prod(sizes)
        ir.objective(owner, add_all(ir, owner, terms), "carried")

        behind = ir.call(
            helper, path, self._joined(ir, helper, starts), role="synthetic", spec=spec_of(final)
        )
        scalars = [o.all_input_nodes[0] for o in ir.objectives(owner)]
        gradients = [
            reduce(
                lambda a, b: ir.emit(owner, operator.add, a, b, role="target"),
                [ir.gradient(scalar, start) for scalar in scalars if start in tape_of(scalar)],
            )
            for start in starts
        ]
        target = self._joined(ir, helper, gradients)
        if self.mean:
            target = ir.emit(helper, of_sample, target, 0, role="target")
        distance = ir.emit(helper, squared_distance, behind, target, role="regression")
        ir.objective(helper, judged(distance, FAILS, REMEDY), "regression")

    @staticmethod
    def _joined(ir: TrainingGraph, helper: str, values: list[fx.Node]) -> fx.Node:
        read = [ir.stop_gradient(helper, v) for v in values]
        return ir.emit(helper, joined, tuple(rows(v) for v in values), *read, role="joined")

    def _network(self, ir: TrainingGraph, owner: str, spec: TensorSpec) -> nn.Module:
        if self.factory is None:
            return build(lambda source, _: build_synthesiser(source, width=self.width), owner, spec, spec)
        network = build_custom(self.factory, owner, spec, prediction_spec(ir), "synthesiser", check=False)
        check_shapes(network, (spec,), spec, f"synthesiser of what module '{owner}' carries")
        return network


def joined(dims: tuple[int, ...], *values: Tensor) -> Tensor:
    """Join values that have their B samples along `dims` to [B,n]."""
    return torch.cat([v.movedim(d, 0).flatten(1) for v, d in zip(values, dims, strict=True)], dim=1)


def separated(joint: Tensor, first: int, sizes: tuple[int, ...], dim: int) -> Tensor:
    """Return the part of [B,n] that begins at column `first`, of some sizes, its samples along `dim`."""
    part: Tensor = joint[:, first : first + math.prod(sizes)].unflatten(1, sizes)
    return part.movedim(0, dim)
