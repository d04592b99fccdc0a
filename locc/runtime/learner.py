"""The optimizer of one owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locc import files
from locc.optimizers import take_step


@dataclass
class Learner:
    """The optimizer of one owner, with what it needs for an update."""

    owner: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip: float | None = None
    pending: int = 0
    skip: Tensor | None = None
    done: bool = False

    @property
    def gated(self) -> bool:
        """Whether the optimizer itself can skip an update on the device, without a synchronisation."""
        able = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        # A checkpoint brings its own choice: one that was made unfused goes on unfused.
        return bool(able) and all(group.get("fused", True) for group in self.optimizer.param_groups)

    @property
    def draws(self) -> bool:
        """Whether an update may draw random numbers: hooks may, and optimizers that are not PyTorch's own."""
        optimizer = self.optimizer
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        return bool(hooks) or not type(optimizer).__module__.startswith("torch.optim.")

    @property
    def rate(self) -> float:
        """The largest learning rate of its parameters."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def skipping(self, value: Tensor) -> Tensor:
        """Have the device skip the next update where an objective is not finite; returns the flag, 1 or 0."""
        flag = (~torch.isfinite(value)).float()
        self.skip = flag if self.skip is None else torch.maximum(self.skip, flag)
        self.optimizer.found_inf = self.skip  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        return flag

    def update(self, accumulate: int) -> bool:
        """Count a backward pass; on the last of `accumulate`, step on the mean gradient and clear it.

        Returns:
            Whether it has made a step.
        """
        if self.done:
            self.clear()
            return True
        self.pending += 1
        if self.pending < accumulate:
            return False
        if self.pending > 1:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_div_(gradients, float(self.pending))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        take_step(self.optimizer)
        self.clear()
        return True

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Update each parameter, and drop its gradient, as soon as the backward pass inside knows that.

        No other parameter has a gradient at that time, so one optimizer does for all.
        """

        def update(parameter: Tensor) -> None:
            take_step(self.optimizer)
            parameter.grad = None

        self.done = True
        hooks = [p.register_post_accumulate_grad_hook(update) for p in self.parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def backup(self) -> Callable[[], None]:
        """Return a function that puts back optimizer state and accumulated gradients as they are now."""
        state = {p: {k: _copied(v) for k, v in held.items()} for p, held in self.optimizer.state.items()}
        gradients = (
            [_copied(p.grad) for p in self.parameters] if self.pending else [None] * len(self.parameters)
        )
        pending, skip = self.pending, self.skip

        def restore() -> None:
            self.optimizer.state.clear()
            self.optimizer.state.update(state)
            self.pending, self.skip = pending, skip
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

        return restore

    def clear(self) -> None:
        """Drop the gradients, so that their memory is free."""
        self.pending, self.skip, self.done = 0, None, False
        for parameter in self.parameters:
            parameter.grad = None


def _copied(value: Any) -> Any:
    return files.copy(value) if isinstance(value, Tensor) else value
