"""What persists between the steps of a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from locc.lower import Instruction, Plan
from locc.runtime.compiled import Codes
from locc.runtime.graphs import Graphs
from locc.runtime.learner import Learner
from locc.runtime.offload import Offload
from locc.runtime.replicas import Replicas
from locc.runtime.stops import non_finite

LATE = (
    "The other modules were updated, in the steps since as well: a step does not wait for the device, unless "
    "compiled with atomic=True"
)


@dataclass
class Context:
    """What the instructions of a step need to know, and what persists between steps.

    `observe` is called after each instruction, with the values in flight. With `guarded=False` an
    objective that is not finite does not stop the step. `atomic` says that whoever runs the step undoes one
    that fails, so that a failure must be known before the step is over. With `in_backward` a parameter is
    updated as soon as the backward pass knows its gradient; the forward of `recompute` modules runs again
    there. `codes` and `graphs` are what a backend has compiled or recorded, `replicas` the ranks that run the
    same on other shares of the batch.
    """

    root: nn.Module
    learners: dict[str, Learner]
    seed: int
    accumulate: int = 1
    autocast: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    observe: Callable[[Instruction, dict[str, Any]], None] | None = None
    atomic: bool = False
    guarded: bool = True
    offload: Offload | None = None
    in_backward: bool = False
    recompute: tuple[nn.Module, ...] = ()
    codes: Codes = field(default_factory=Codes)
    graphs: Graphs | None = None
    replicas: Replicas | None = None
    flags: list[tuple[int, str, Tensor, torch.cuda.Event | None]] = field(default_factory=list)

    @cached_property
    def modules(self) -> list[nn.Module]:
        """Everything under the root; a walk that a step would spend on nothing."""
        return list(self.root.modules())

    @cached_property
    def linear(self) -> list[nn.Module]:
        """With `in_backward`, linear layers that need little memory: those that read as much as they make.

        Layers that are computed again have nothing to let go of, and would compute their output for nothing.
        """
        if not self.in_backward:
            return []
        again = {m for module in self.recompute for m in module.modules()}
        found = (m for m in self.modules if type(m) is nn.Linear and "forward" not in vars(m))
        return [m for m in found if m.in_features >= m.out_features and m not in again]

    def unknown(self, plan: Plan) -> bool:
        """Whether a step of a plan runs what the backend may have to refuse, which is not known yet."""
        return self.codes.unknown(plan) if self.graphs is None else self.graphs.unknown(plan)

    def defer(self, step: int, name: str, flag: Tensor) -> None:
        """Note a flag on the device, to be read when it has arrived without waiting for it."""
        if flag.device.type == "cpu":
            self.flags.append((step, name, flag.clone(), None))
            return
        arriving = torch.empty((), pin_memory=True).copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.flags.append((step, name, arriving, event))

    def raise_deferred(self, step: int | None = None) -> None:
        """Raise for a non-finite objective that an earlier step met on the device.

        Waits for the device only for flags older than two steps; without `step`, for all.
        """
        flags, self.flags = self.flags, []
        for i, (made, name, flag, event) in enumerate(flags):
            if step is not None and made > step - 2 and event is not None and not event.query():
                self.flags = flags[i:]
                return
            if event is not None:
                event.synchronize()
            if bool(flag):
                raise non_finite(name, float("nan"), LATE)
