"""Features replay: each module trains on what it read some steps ago, with gradients that arrive late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from locc import Method, Pass
from locc.ir import Owner, TrainingGraph, inner, tape_of
from locc.rewrite import LentGradients, OutputLoss, activations, add_all, has_rows, unreached


@dataclass(frozen=True)
class Replay(Pass):
    """Gives module k of K the objective <h_k, sg d>: what it read K - k steps ago, run through it again.

    d is the gradient of a reader r of h_k with respect to what r read of it, as it was r - k steps ago, when
    r ran on the batch on which k runs now. Until a first one has come it is zero, and so is the update.
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        """Replay the modules before the last, the later ones first: they send what trains the earlier."""
        scalars: dict[str, fx.Node] = {ir.last.name: ir.apply_loss()}
        read = {b.entry: b.entry for b in ir.boundaries(consumer=ir.last.name)}
        for module in reversed(ir.modules[:-1]):
            late = {n: self._late(ir, module, n) for n in self._reads(ir, module)}
            sent = activations(ir, module.name)
            again = ir.replay(module.name, late, sent, role="replay")
            arriving = [list(self._arriving(ir, module, value, scalars, read)) for value in sent]
            pairs = [(h, d) for h, found in zip(again, arriving, strict=True) for d in found]
            terms = [ir.emit(module.name, inner, h, d, role="chain") for h, d in pairs]
            scalars[module.name] = add_all(ir, module.name, terms)
            ir.objective(module.name, scalars[module.name], "replay")
            read |= late

    @staticmethod
    def _reads(ir: TrainingGraph, module: Owner) -> Iterator[fx.Node]:
        """Yield the values of the batch on which the module runs, and those that others send it."""
        yield from (b.entry for b in ir.boundaries(consumer=module.name) if has_rows(b.value))
        yield from (n for n in ir.inputs if any(u.meta.get("owner") == module.name for u in n.users))

    @staticmethod
    def _late(ir: TrainingGraph, module: Owner, value: fx.Node) -> fx.Node:
        before = ir.delay(value, ir.last.index - module.index, owner=module.name)
        return ir.stop_gradient(module.name, before, role="late")

    @staticmethod
    def _arriving(
        ir: TrainingGraph,
        module: Owner,
        value: fx.Node,
        scalars: dict[str, fx.Node],
        read: dict[fx.Node, fx.Node],
    ) -> Iterator[fx.Node]:
        for boundary in (b for b in ir.boundaries(producer=module.name) if b.value is value):
            scalar, leaf = scalars[boundary.consumer], read[boundary.entry]
            if leaf in tape_of(scalar):
                steps = ir.owners[boundary.consumer].index - module.index
                yield ir.stop_gradient(module.name, ir.delay(ir.gradient(scalar, leaf), steps))


@dataclass(frozen=True)
class FeaturesReplay(Method):
    """Backpropagation without backward locking: every module runs its backward pass in every step, late."""

    family: ClassVar[str] = "delayed"
    reference: ClassVar[str] = "Huo, Gu & Huang 2018, Training neural networks using features replay"

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse modules to which nothing comes back."""
        yield from unreached(ir)

    def passes(self) -> Sequence[Pass]:
        """Return the loss of the last module, the replays, and what lent parameters get."""
        return (OutputLoss(), Replay(), LentGradients())
