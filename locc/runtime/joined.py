"""What modules of one structure hold, stacked: parameters in rows, and what their optimizers keep of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locc.optimizers import take_step
from locc.runtime.learner import Learner
from locc.runtime.pure import Member, detached

_ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)
"""Optimizers that move an element of a parameter whatever the others are: they can move a row."""


@dataclass
class Joined:
    """Copies of what some modules hold, which are `put_back`.

    Attributes:
        rows: their parameters, each [P]; the `.grad` of one is its row of `gradients`.
        gradients: [K, P].
        trained: the parameters as views of the rows, each [K, *shape].
        fixed: the other tensors, each [K, *shape].
        optimizer: one for all rows; None where the optimizers of the modules step one by one.
    """

    members: Sequence[Member]
    rows: list[Tensor]
    gradients: Tensor
    trained: list[Tensor]
    fixed: list[Tensor]
    optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def of(cls, members: Sequence[Member], accumulate: int) -> Joined:
        """Stack what members hold; what their optimizers keep as well, where one can step for all."""
        own = [torch.stack(parts) for parts in zip(*(detached(m.trained) for m in members), strict=True)]
        fixed = [torch.stack(parts) for parts in zip(*(detached(m.fixed) for m in members), strict=True)]
        whole = torch.cat([stack.reshape(len(members), -1) for stack in own], 1)
        sizes = [stack[0].numel() for stack in own]
        views = [part.view(stack.shape) for part, stack in zip(whole.split(sizes, 1), own, strict=True)]
        made = cls(members, list(whole), torch.empty_like(whole), views, fixed)
        if accumulate == 1:
            made._join([learner for member in members for learner in member.learners])
        return made

    def _join(self, learners: list[Learner]) -> None:
        """Make one optimizer of those of the members, where it need know nothing but their rows."""
        joint = None if len(learners) > len(self.members) else joint_of(learners)
        if joint is None or any(p.grad is not None for learner in learners for p in learner.parameters):
            return
        for row, member, learner in zip(self.rows, self.members, learners, strict=True):
            state = _together(learner.optimizer.state, list(member.trained.values()))
            if state is None:
                return
            if state:
                joint.state[row] = state
        self.optimizer = joint
        for row, gradient in zip(self.rows, self.gradients, strict=True):
            row.grad = gradient

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Take over the gradients of the parameters, each [K, *shape]."""
        torch.cat([g.reshape(len(self.members), -1) for g in gradients], 1, out=self.gradients)

    def update(self, active: range, accumulate: int) -> None:
        """Step the optimizers of active members."""
        learners = [learner for i in active for learner in self.members[i].learners]
        if self.optimizer is None:
            for i in active:
                for p, gradient in zip(*self._parts(i, self.gradients[i]), strict=True):
                    p.grad = gradient if p.grad is None else p.grad + gradient
            for learner in learners:
                learner.update(accumulate)
            return
        rows = self.rows[active.start : active.stop]
        step_together(self.optimizer, learners, [[row] for row in rows])

    @property
    def buffers(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Those of the other tensors that a step may write: each as the members have it, and stacked."""
        for own, stack in zip(
            zip(*(m.fixed.values() for m in self.members), strict=True), self.fixed, strict=True
        ):
            if not isinstance(own[0], nn.Parameter):
                yield list(own), stack

    @torch.no_grad()
    def put_back(self) -> None:
        """Copy what has changed to where it came from."""
        pairs = [pair for own, stack in self.buffers for pair in zip(own, stack, strict=True)]
        if self.optimizer is not None:
            for i, (member, row) in enumerate(zip(self.members, self.rows, strict=True)):
                pairs += zip(*self._parts(i, row), strict=True)
                state = member.learners[0].optimizer.state
                for key, value in self.optimizer.state.get(row, {}).items():
                    every = value.shape == row.shape if isinstance(value, Tensor) else False
                    parts = self._parts(i, value)[1] if every else [value] * len(member.trained)
                    for p, part in zip(member.trained.values(), parts, strict=True):
                        pairs += _kept(state[p], key, part)
        if pairs:
            targets, sources = zip(*pairs, strict=True)
            torch._foreach_copy_(targets, sources)

    def _parts(self, number: int, row: Tensor) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Return the parameters of a member, and the part of its row for each."""
        own = list(self.members[number].trained.values())
        parts = row.split([p.numel() for p in own])
        return own, [part.view(p.shape) for p, part in zip(own, parts, strict=True)]


def joint_of(learners: Sequence[Learner]) -> torch.optim.Optimizer | None:
    """Return an optimizer that can step for some, without their state; None where there is none."""
    first = learners[0].optimizer
    if not all(type(learner.optimizer) is type(first) and _plain(learner) for learner in learners):
        return None
    joint: torch.optim.Optimizer = object.__new__(type(first))
    vars(joint).update(vars(first))
    vars(joint).pop("step", None)
    joint.state = defaultdict(dict)
    return joint


def step_together(
    joint: torch.optim.Optimizer, learners: Sequence[Learner], tensors: Sequence[list[Tensor]]
) -> None:
    """Step on the tensors of each learner, by its own settings."""
    groups = [learner.optimizer.param_groups[0] for learner in learners]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    if all(one == settings[0] for one in settings):
        joint.param_groups = [{**settings[0], "params": [t for own in tensors for t in own]}]
    else:
        joint.param_groups = [{**one, "params": own} for one, own in zip(settings, tensors, strict=True)]
    take_step(joint)
    for learner in learners:
        if "step" in vars(learner.optimizer):  # a scheduler's, which warns where none was taken
            learner.optimizer._opt_called = True  # type: ignore[attr-defined]


def _plain(learner: Learner) -> bool:
    """Whether an optimizer does nothing beside moving elements."""
    optimizer = learner.optimizer
    step = vars(optimizer).get("step")
    return (
        type(optimizer) in _ELEMENTWISE
        and len(optimizer.param_groups) == 1
        and (step is None or hasattr(step, "_wrapped_by_lr_sched"))
        and not learner.draws
        and learner.clip is None
    )


def _together(state: Mapping[Tensor, Any], parameters: list[nn.Parameter]) -> dict[str, Any] | None:
    """Return what an optimizer keeps of parameters as if they were one; None where that cannot be."""
    held = [state.get(p, {}) for p in parameters]
    found = {}
    for key in {key: None for kept in held for key in kept}:
        parts = [kept.get(key) for kept in held]
        if all(isinstance(v, Tensor) and v.shape == p.shape for v, p in zip(parts, parameters, strict=True)):
            found[key] = torch.cat([v.reshape(-1) for v in parts])
        elif all(isinstance(v, Tensor) and v.dim() == 0 and v == parts[0] for v in parts):
            found[key] = parts[0].clone()
        elif any(v is not None for v in parts):
            return None
    # The number of steps of a scalar cannot be told from its momentum.
    return found if any(p.dim() for p in parameters) else None


def _kept(state: dict[str, Any], key: str, value: Any) -> list[tuple[Tensor, Tensor]]:
    """Set an entry of a parameter's state, or return what is to be copied where there is one."""
    before = state.get(key)
    if not isinstance(value, Tensor):
        state[key] = value
    elif isinstance(before, Tensor):
        return [(before, value)]
    else:
        state[key] = value.clone()
    return []
