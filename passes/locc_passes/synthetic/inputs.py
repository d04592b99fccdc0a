"""Synthetic inputs: modules that run on a prediction of what the modules before them send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from locc.ir import Boundary, Owner, TensorSpec, TrainingGraph
from locc.nn import build_inverse, build_synthesiser
from locc.rewrite import Pass, build, has_rows, judged, layout_at, read_by, rows, spec_of, squared_distance

FAILS = "predicts {how} of what the module would read"
REMEDY = "raise its learning rate against the modules' (lr_scale), or cut the network in fewer places"


@dataclass(frozen=True)
class SyntheticInputs(Pass):
    """Lets each module but the first train on sg I(x), with the objective ||I(x) - sg h||^2 for I.

    h is what the module reads at inference: the output of the module before, which ran on a synthetic input
    itself. The distance is summed over units, mean over the rows. The auxiliary `<module>.inputs` holds a
    network I for each activation that the module reads: an affine map from the model's input x to the shape
    of h, and a synthesiser, which starts at zero. Runs last, so that the gradients which modules send back
    are those at the synthetic inputs.
    """

    width: int | None = None
    lr_scale: float = 1.0

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """There is one input to predict from."""
        found = [n for n in ir.inputs if spec_of(n).differentiable and has_rows(n)]
        if len(found) != 1 and len(ir.modules) > 1:
            names = " and ".join(f"'{n.name}', {spec_of(n)}," for n in ir.inputs)
            yield (
                "synthetic inputs are predicted from one floating-point input of the model, and this one "
                f"takes {names} so leave inputs=False"
            )

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the networks, their objectives, and what the modules read in training."""
        x = next((n for n in ir.inputs if spec_of(n).differentiable and has_rows(n)), None)
        for module in ir.modules[1:]:
            reads = read_by(ir, module.name)
            if reads and x is not None:
                helper = ir.add_owner(f"{module.name}.inputs", module, self.lr_scale).name
                for boundary in reads:
                    self._feed(ir, module, helper, x, boundary, len(reads) == 1)

    def _feed(
        self, ir: TrainingGraph, module: Owner, helper: str, x: fx.Node, boundary: Boundary, alone: bool
    ) -> None:
        value, name = boundary.value, boundary.value.name
        path = ir.add_module(helper if alone else f"{helper}.{name}", self._network(ir, module, x, value))
        made = ir.call(helper, path, x, role="synthetic_input", spec=spec_of(value))
        wanted = ir.stop_gradient(helper, value)
        distance = ir.emit(helper, squared_distance, made, wanted, rows(value), role="imitation")
        ir.objective(helper, judged(distance, FAILS, REMEDY), "imitation" if alone else f"imitation_{name}")
        ir.feed(module.name, boundary.entry, ir.stop_gradient(module.name, made, role="synthetic_input"))

    def _network(self, ir: TrainingGraph, module: Owner, x: fx.Node, value: fx.Node) -> nn.Module:
        def make(source: TensorSpec, result: TensorSpec) -> nn.Module:
            layout = layout_at(ir, value)
            return nn.Sequential(
                build_inverse(source, result, "linear", from_layout=layout_at(ir, x), to_layout=layout),
                build_synthesiser(result, width=self.width, layout=layout),
            )

        return build(make, module.name, spec_of(x), spec_of(value))
