"""A recurrent network on chunks of long sequences: its state is carried, the gradient behind it predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx, nn

from locc import Method, Pass
from locc.ir import TrainingGraph, inner
from locc.rewrite import GradientChain, OutputLoss, spec_of


def of_batch(predicted: Tensor, weight: float) -> Tensor:
    """Return the gradient of `weight` times the mean loss, from those of each sample's."""
    return weight * predicted / len(predicted)


def regression(predicted: Tensor, *gradients: Tensor) -> Tensor:
    """Return ||predicted - g||^2, mean over rows; g is the sum of the gradients, for one sample's loss."""
    return (predicted - len(predicted) * sum(gradients)).square().sum() / len(predicted)


@dataclass(frozen=True)
class CarriedState(Pass):
    """Carries a state h from step to step, and predicts as s(h) the gradient that the next step has for it.

    Training feeds the input h_0 with the h_T of the step before. The module of h_T gets the objective
    <h_T, weight s(h_T)>, and s, zero at first, ||s(h_0) - g||^2, g the gradient of the module's objectives.
    """

    name: str
    weight: float

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """The module that reads the input computes the model's last output, of the same shape."""
        end, found = self._end(ir), [n for n in ir.inputs if n.name == self.name]
        alike = {u.meta["owner"] for n in found if spec_of(n) == end.meta["spec"] for u in n.users}
        if alike != {end.meta["owner"]}:
            yield f"the model's last output is not the next '{self.name}' of a module that reads it (state=)"

    def _end(self, ir: TrainingGraph) -> fx.Node:
        value = ir.output.all_input_nodes[-1]
        return value.all_input_nodes[0] if value.meta["role"] == "boundary" else value

    def rewrite(self, ir: TrainingGraph) -> None:
        """Carry the state, predict the gradient at its end, and learn from the one at its start."""
        end = self._end(ir)
        owner, spec = str(end.meta["owner"]), spec_of(end)
        held = ir.state(owner, f"{self.name}_carried", spec)
        ir.assign(owner, held, end)
        start = ir.stop_gradient(owner, held, role="carried")
        ir.feed(owner, next(n for n in ir.inputs if n.name == self.name), start)
        helper = ir.add_owner(f"{owner}.synthesiser", ir.owners[owner]).name
        path = ir.add_module(helper, nn.Linear(*spec.features, *spec.features, dtype=spec.dtype))
        for parameter in ir.root.get_submodule(path).parameters():
            nn.init.zeros_(parameter)
        ahead = ir.call(helper, path, ir.stop_gradient(helper, end), role="synthetic")
        arriving = ir.emit(owner, of_batch, ir.stop_gradient(owner, ahead), self.weight, role="synthetic")
        ir.objective(owner, ir.emit(owner, inner, end, arriving, role="chain"), "synthetic")
        behind = ir.call(helper, path, ir.stop_gradient(helper, start), role="synthetic")
        found = [ir.stop_gradient(helper, ir.gradient(o.args[0], start)) for o in ir.objectives(owner)]
        ir.objective(helper, ir.emit(helper, regression, behind, *found, role="regression"), "regression")


@dataclass(frozen=True)
class Chunks(Method):
    """Truncated backpropagation through time, with a synthetic gradient where it is truncated."""

    family: ClassVar[str] = "synthetic"
    reference: ClassVar[str] = "Jaderberg et al. 2017, Decoupled neural interfaces, section 3.1"
    state: str = field(default="h0", metadata={"help": "the input that is carried"})
    weight: float = field(default=1.0, metadata={"help": "of the synthetic gradient; 0 truncates"})

    def passes(self) -> Sequence[Pass]:
        """Return the loss, the gradients between the modules of a step, and the carried state."""
        return (OutputLoss(), GradientChain(), CarriedState(self.state, self.weight))
