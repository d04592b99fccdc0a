"""`ifa`: indirect feedback alignment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx, nn

from locc.ir import TrainingGraph, inner, tape_of
from locc.rewrite import (
    LentGradients,
    Method,
    OutputLoss,
    Pass,
    Recipe,
    add_all,
    before_nonlinearity,
    pull,
    push,
    read_by,
)
from locc_passes.feedback.dfa import DirectFeedback, errors_of, taught
from locc_passes.feedback.layers import LAYERS
from locc_passes.feedback.published import RECIPE, advice, averaged_away


@dataclass(frozen=True)
class IndirectFeedback(DirectFeedback):
    """Gives each module but the last the objective <h, d>, with d handed up from the modules before it.

    A module that reads no other one gets d = B e, as in `DirectFeedback`. Its delta is what reaches, from
    <h, d>, the value before its last nonlinearity; a module that reads h gets d = J delta, J the Jacobian of
    what lies between h and the value before its own last nonlinearity (for a layer, its weight).
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the error at the output, and objectives from the first module up."""
        if len(ir.modules) == 1:
            return
        errors = errors_of(ir)
        deltas: dict[fx.Node, fx.Node] = {}
        for module in ir.modules[:-1]:
            terms = []
            for number, value in enumerate(taught(ir, module.name)):
                before = before_nonlinearity(ir, value)
                arriving = {
                    b.entry: ir.stop_gradient(module.name, deltas[b.value])
                    for b in read_by(ir, module.name)
                    if b.value in deltas and b.entry in tape_of(before)
                }
                if arriving:
                    sent = push(ir, module.name, arriving, before)
                else:
                    sent = self.broadcast(ir, errors, value, number)
                terms.append(ir.emit(module.name, inner, value, sent, role="feedback"))
                deltas[value] = pull(ir, value, sent)
            if terms:
                ir.objective(module.name, add_all(ir, module.name, terms), "feedback")


@dataclass(frozen=True)
class IFA(Method):
    """Indirect feedback alignment: the first module gets the output error, and hands it up layer by layer.

    delta_1 = (B e) * sigma'(a_1) with B fixed; delta_{k+1} = (W_{k+1} delta_k) * sigma'(a_{k+1}). Cut after
    the nonlinearity of each layer: a module's delta is taken before the nonlinearity with which it ends, and
    goes up through whatever lies between that and the next. Modules update one after the other, upward.
    Weights of zero, from which `dfa` may start, would hand nothing up.
    """

    family: ClassVar[str] = "feedback"
    reference: ClassVar[str] = "Nøkland 2016"
    recipe: ClassVar[Recipe] = replace(RECIPE, network="tanh units or ReLUs")
    opens: ClassVar[tuple[type[nn.Module], ...]] = LAYERS

    def passes(self) -> Sequence[Pass]:
        """Return the loss of the last module and the indirect feedback of the others."""
        return (OutputLoss(), IndirectFeedback(), LentGradients())

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of ReLUs without normalisation, and of a mean over positions."""
        yield from advice(ir)
        yield from averaged_away(ir)
