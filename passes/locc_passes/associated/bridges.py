"""Bridges: what a module of the input's side trains on, and the path of inference over the top one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import fx, nn
from torch.nn import functional

from locc.ir import TrainingGraph
from locc.nn import Factory, build_bridge
from locc.rewrite import Pass, add_all, build, build_custom, layout_at, prediction_spec, spec_of
from locc_passes.associated.dense import prolong
from locc_passes.associated.fold import fold_inference
from locc_passes.associated.labels import Code


@dataclass(frozen=True)
class Bridges(Pass):
    """Trains each encoder f_i and its bridge b_i on mean (b_i(s_i) - sg t_i)^2.

    The top bridge stays in the inference path, between the encoders and the decoders, unless the middle
    module is that bridge already.
    """

    expansion: float = 5.0
    factory: Factory | None = None

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the bridges and their objectives, and fold the inference path."""
        meeting = {m.name: [n for n in ir.nodes(m.name) if "meets" in n.meta] for m in ir.modules}
        top = [owner for owner, values in meeting.items() if values][-1]
        for owner, values in meeting.items():
            terms = [self._meet(ir, owner, value, owner == top) for value in values]
            if terms:
                ir.objective(owner, add_all(ir, owner, terms), "associated")

    def _meet(self, ir: TrainingGraph, owner: str, value: fx.Node, top: bool) -> fx.Node:
        code: Code = value.meta.pop("meets")
        if "bridged" not in value.meta:
            path = ir.add_module(f"bridge_{owner}", self._bridge(ir, owner, value, code))
            if top:
                decoders = [str(node.target) for node in reversed(ir.nodes(role="decoder"))]
                if decoders:
                    prolong(ir, owner, path, decoders, code)
                else:
                    fold_inference(ir, owner, path, code)
            value = ir.call(owner, path, value, role="bridge")
        return ir.emit(owner, functional.mse_loss, value, code.of_batch(ir, owner), role="associate")

    def _bridge(self, ir: TrainingGraph, owner: str, value: fx.Node, code: Code) -> nn.Module:
        if self.factory is not None:
            return build_custom(self.factory, owner, spec_of(value), code.spec, "bridge")
        make = partial(
            build_bridge,
            expansion=self.expansion,
            per_position=len(prediction_spec(ir).shape) > 2,
            from_layout=layout_at(ir, value),
            to_layout=code.layout,
        )
        return build(make, owner, spec_of(value), code.spec)

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Every owner has exactly one objective, and no decoder reads a value of an encoder."""
        for owner in ir.owners:
            if len(ir.objectives(owner)) != 1:
                yield f"'{owner}' has {len(ir.objectives(owner))} objectives"
        encoders = {node.meta["owner"] for node in ir.nodes(role="associate")}
        for boundary in ir.boundaries():
            if boundary.producer in encoders and boundary.consumer not in encoders:
                yield f"'{boundary.value.name}' still crosses the fold"
