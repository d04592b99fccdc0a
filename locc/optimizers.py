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
    """Run a step, past two faults of PyTorch's fused kernels (2.13).

    Those for the CPU read and write a parameter, its gradient and its state as if all were contiguous:
    elements are mixed up, and where the memory of parameters interleaves, others change. That of SGD refuses
    parameters that have their first gradient after others (an expert that no sample had come to), and after
    a first step that it skips, it goes on from a momentum that nobody has set.
    """
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        moving = [p for p in group["params"] if p.grad is not None]
        new = _without_momentum(optimizer, moving) if group.get("momentum") else []
        contiguous = all(p.is_contiguous() for p in group["params"])
        if not contiguous or not all(p.grad.is_contiguous() for p in moving) or (new and group["dampening"]):
            group["fused"] = False
            continue
        for parameter in new:  # from a momentum of zero, a step that is not dampened is the first one
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizer.step()


def _without_momentum(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    return [p for p in parameters if optimizer.state[p].get("momentum_buffer") is None]
