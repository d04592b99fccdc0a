"""What a good engineer writes without locc: the references of `make bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.models import Chain

Loss = Callable[[Tensor, Tensor], Tensor]


class EndToEnd:
    """Backpropagation through the whole model, one fused Adam over all its parameters.

    With `compiled` the forward and the backward pass are what `torch.compile` makes of them.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, compiled: bool = False) -> None:
        def objective(x: Tensor, y: Tensor) -> Tensor:
            return loss(model(x), y)

        self.objective = torch.compile(objective, fullgraph=True) if compiled else objective
        self.optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on one batch and return the loss."""
        loss = self.objective(x, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class LittleMemory:
    """Backpropagation through the whole model for those who have too little memory for it.

    Each block is computed again in the backward pass, and each parameter is updated, and its gradient
    dropped, as soon as that gradient is known. BatchNorm sees a batch twice, so its running statistics differ
    from those of `EndToEnd`; without it both train the same bits.
    """

    def __init__(self, model: Chain, loss: Loss) -> None:
        self.model = model
        self.loss = loss
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_updating(torch.optim.Adam([parameter], fused=True)))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on one batch and return the loss."""
        h = self.model.stem(x)
        for block in self.model.blocks:
            h = checkpoint(block, h, use_reentrant=False, preserve_rng_state=False)
        loss = self.loss(self.model.head(h), y)
        loss.backward()
        return loss.detach()


def _updating(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def update(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


class DetachLoop:
    """Decoupled greedy learning: each module has its head, its loss and its Adam.

    A module's backward pass, update and release come as soon as its loss is known; the next module
    receives the detached output. `heads` has one head fewer than `modules`: the last module ends in the
    model's own head.
    """

    def __init__(self, modules: Sequence[nn.Module], heads: Sequence[nn.Module], loss: Loss) -> None:
        self.modules = list(modules)
        self.heads = [*heads, nn.Identity()]
        self.loss = loss
        self.optimizers = [
            torch.optim.Adam([*module.parameters(), *head.parameters()], fused=True)
            for module, head in zip(self.modules, self.heads, strict=True)
        ]

    def step(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Train on one batch and return each module's loss."""
        losses = []
        for module, head, optimizer in zip(self.modules, self.heads, self.optimizers, strict=True):
            h = module(x)
            loss = self.loss(head(h), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            x = h.detach()
            del h, loss  # frees the tape before the next module runs
        return losses
