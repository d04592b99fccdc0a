"""What local learning has published beside the optimizers of PyTorch: signs of gradients, norms that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class BatchManhattan(torch.optim.SGD):
    """SGD on the signs of the gradients: w <- w - lr v, v <- momentum v + sign(g) + weight_decay w.

    Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?" (2016). The paper tries
    several places for momentum and decay; here both act after the sign, as in SGD.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; `closure`, if given, computes the gradients once more and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.sign()
        super().step()
        return loss


def keep_norms(optimizer: torch.optim.Optimizer) -> None:
    """Have each step of an optimizer end with every weight at the norm that it had before.

    Moskovitz, Litwin-Kumar & Abbott 2018 (strict normalisation). A weight is a parameter of two or more
    dimensions; one of norm zero moves as it would.
    """
    before: list[Tensor] = []

    def note(*_: Any) -> None:
        before[:] = [torch.linalg.vector_norm(w.detach()) for w in _weights(optimizer)]

    @torch.no_grad()
    def rescale(*_: Any) -> None:
        for weight, norm in zip(_weights(optimizer), before, strict=True):
            now = torch.linalg.vector_norm(weight)
            weight.mul_(torch.where((norm > 0) & (now > 0), norm / now, 1))

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(rescale)


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the weights that a step moves: within a backward pass, others are still to be read by it."""
    return [p for g in optimizer.param_groups for p in g["params"] if p.dim() > 1 and p.grad is not None]


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Run a step, without fused kernels where a tensor is not contiguous.

    Those of PyTorch for the CPU (2.13) read and write a parameter, its gradient and its state as if all were
    contiguous: elements are mixed up, and where the memory of parameters interleaves, others change.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and not all(
            p.is_contiguous() and (p.grad is None or p.grad.is_contiguous()) for p in group["params"]
        ):
            group["fused"] = False
    optimizer.step()
