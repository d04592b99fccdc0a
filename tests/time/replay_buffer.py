"""A replay buffer between modules: a ring of minibatches, from which the next module takes an older one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from locc import Method, Pass
from locc.ir import TensorSpec, TrainingGraph
from locc.rewrite import CLASS_IDS, AttachHeads, LocalLoss, OutputLoss, has_rows, option, spec_of


def written(ring: Tensor, minibatch: Tensor, clock: Tensor) -> Tensor:
    """Return the ring [M,...] with a minibatch [...] in slot `clock` mod M."""
    return ring.index_copy(0, (clock % len(ring)).reshape(1), minibatch.unsqueeze(0))


def taken(ring: Tensor, clock: Tensor, stride: int) -> Tensor:
    """Return slot `stride * clock` mod n, where n = min(clock + 1, M) slots have been written."""
    return ring.index_select(0, (stride * clock % (clock + 1).clamp(max=len(ring))).reshape(1)).squeeze(0)


@dataclass(frozen=True)
class Rings(Pass):
    """Gives each module but the first a ring of what it receives, activations with their labels.

    In each step the module below writes its minibatch over the oldest one, and then the module takes one by
    the policy of `taken`: with stride 2, of age 0, 1, 1, .., and from step M on 0, M - 1, .., 1 in turn.
    What it makes of that goes into the next ring, with the labels that came along.
    """

    size: int
    stride: int

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse what would bring samples of several minibatches together."""
        for b in ir.boundaries():
            if ir.owners[b.consumer].index != ir.owners[b.producer].index + 1:
                yield f"'{b.value.name}' skips from '{b.producer}' to '{b.consumer}'; split where none does"
        for module in {str(u.meta.get("owner")) for n in ir.inputs for u in n.users} - {ir.modules[0].name}:
            yield f"module '{module}' reads an input as it is now; split so that the first one alone does"

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the rings, and let each module read from its own."""
        labels = ir.target
        for module in (m.name for m in ir.modules[1:]):
            clock = ir.state(module, f"{module}_clock", TensorSpec((), torch.int64))
            ir.assign(module, clock, ir.emit(module, torch.add, clock, 1, role="clock"))
            for entry in (b.entry for b in ir.boundaries(consumer=module) if has_rows(b.value)):
                ir.feed(module, entry, self._through(ir, module, entry, clock))
            labels = self._through(ir, module, ir.stop_gradient(module, labels), clock)
            ir.feed(module, ir.target, labels)

    def _through(self, ir: TrainingGraph, owner: str, value: fx.Node, clock: fx.Node) -> fx.Node:
        spec = TensorSpec((self.size, *spec_of(value).shape), spec_of(value).dtype)
        ring = ir.state(owner, f"{value.name}_ring", spec)
        now = ir.emit(owner, written, ring, value, clock, role="ring")
        ir.assign(owner, ring, now)
        return ir.emit(owner, taken, now, clock, self.stride, role="taken")


@dataclass(frozen=True)
class Buffered(Method):
    """Decoupled greedy learning through synchronous replay buffers."""

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "Belilovsky, Eickenberg & Oyallon 2020, Decoupled greedy learning of CNNs"
    target: ClassVar[tuple[str, ...]] = (CLASS_IDS,)
    size: int = option(4, "number M of minibatches in a ring")
    stride: int = option(2, "slots by which the reader moves in a step")

    def passes(self) -> Sequence[Pass]:
        """Return the heads, the losses and the rings."""
        return (AttachHeads("linear"), LocalLoss(), OutputLoss(), Rings(self.size, self.stride))
