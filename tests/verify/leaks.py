"""Models with planted leaks, and harmless ones that look like them.

Each model is a chain of three leaf modules `a`, `b`, `c` of width 4; the leak, if any, is in `b` or `c`
and reaches into an earlier module behind the graph's back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Leaf(nn.Module):
    """A linear layer and tanh; the base of every planted module."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Planted(Leaf):
    """A leaf whose forward goes through `act(self, x)`."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor], other: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.others = (other,)  # in a tuple, so that it is not registered as a submodule
        self.active = True
        self.register_buffer("state", torch.zeros(4))

    @property
    def other(self) -> Any:
        return self.others[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x) if self.active else super().forward(x)


class Stashing(Leaf):
    """Keeps what it computed, live, for anybody who asks."""

    def __init__(self, detach: bool = False) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.detach = detach
        self.register_buffer("shared", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        self.last = h.detach() if self.detach else h
        return h


class Chain(nn.Module):
    """a -> b -> c -> head."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.a = first or Leaf()
        self.b = Planted(act, self.a)
        self.c = Leaf()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


def plain(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.linear(x))


# ---- leaks ----------------------------------------------------------------------------------


def reads_stash(m: Any, x: Tensor) -> Tensor:
    """An activation that the module before kept on an attribute, live."""
    return plain(m, x + m.other.last)


def reads_previous_stash(m: Any, x: Tensor) -> Tensor:
    """A live activation of its own, kept for the next step."""
    before = getattr(m, "kept", None)
    h = plain(m, x if before is None else x + 0.1 * before.mean())
    m.kept = h
    return h


def reads_foreign_previous(m: Any, x: Tensor) -> Tensor:
    """A live activation of the module before, read one step later."""
    before = getattr(m, "kept", None)
    m.kept = m.other.last
    return plain(m, x if before is None else x + 0.1 * before.mean())


def live_buffer(m: Any, x: Tensor) -> Tensor:
    """A live value of the module before, written into a buffer and read back."""
    m.state = m.other.last.mean(0)
    return plain(m, x + m.state)


def history_buffer(m: Any, x: Tensor) -> Tensor:
    """A buffer that keeps the tape of every earlier step."""
    m.state = 0.9 * m.state + plain(m, x).mean(0)
    return plain(m, x) + m.state


def foreign_weight(m: Any, x: Tensor) -> Tensor:
    """A view of another module's weight."""
    return torch.tanh(m.linear(x) + x @ m.other.linear.weight.t()[:, :4])


def no_grad_wrong_line(m: Any, x: Tensor) -> Tensor:
    """Meant to protect the foreign weight, but only its norm is computed without a tape."""
    w = m.other.linear.weight
    with torch.no_grad():
        scale = w.norm()
    return plain(m, x) + (w / scale).mean()


def straight_through(m: Any, x: Tensor) -> Tensor:
    """Rounds forward, and lets the gradient through to the module before."""
    live = m.other.last
    return plain(m, x + (torch.round(live) - live).detach() + live)


def inplace_after_detach(m: Any, x: Tensor) -> Tensor:
    """Adds a live value in place to a detached one."""
    x = x.detach().clone()
    x += m.other.last
    return plain(m, x)


def view_copy_after_detach(m: Any, x: Tensor) -> Tensor:
    """Copies a live value into a view of a detached one."""
    x = x.detach().clone()
    x[:, 0].copy_(m.other.last[:, 0])
    return plain(m, x)


class _WritesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: list[Tensor]) -> Tensor:
        ctx.weights = weights
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        for w in ctx.weights:
            w.grad = torch.full_like(w, g.mean().item())
        return g, None


def custom_function(m: Any, x: Tensor) -> Tensor:
    """A custom function that writes a foreign gradient in its backward."""
    return _WritesGradient.apply(plain(m, x), [m.other.linear.weight])


def tensor_hook(m: Any, x: Tensor) -> Tensor:
    """A tensor hook that writes a foreign gradient."""
    h = plain(m, x)
    w = m.other.linear.weight
    if h.requires_grad:

        def write(g: Tensor) -> None:
            w.grad = torch.ones_like(w) * g.sum().item()

        h.register_hook(write)
    return h


def forward_write(m: Any, x: Tensor) -> Tensor:
    """Writes a foreign gradient in its forward."""
    w = m.other.linear.weight
    w.grad = torch.ones_like(w)
    return plain(m, x)


def checkpoint_reentrant(m: Any, x: Tensor) -> Tensor:
    """A re-entrant checkpoint around a foreign module: its parameters are not on the outer tape."""
    return plain(m, x) + checkpoint(m.other.linear, plain(m, x), use_reentrant=True)


def checkpoint_non_reentrant(m: Any, x: Tensor) -> Tensor:
    """A checkpoint around a foreign module."""
    return plain(m, x) + checkpoint(m.other.linear, x, use_reentrant=False)


def data_alias_parameter(m: Any, x: Tensor) -> Tensor:
    """Changes a foreign parameter behind autograd's back."""
    m.other.linear.weight.data.mul_(0.99)
    return plain(m, x)


def data_alias_activation(m: Any, x: Tensor) -> Tensor:
    """Changes the module before's output behind autograd's back."""
    x.data.add_(1.0)
    return plain(m, x)


def foreign_buffer(m: Any, x: Tensor) -> Tensor:
    """Changes a buffer of another module."""
    m.other.shared.add_(1.0)
    return plain(m, x)


def reads_own_then_foreign_module(m: Any, x: Tensor) -> Tensor:
    """Calls another module that is not registered under it."""
    return plain(m, x) + m.other.linear(x.detach())


# ---- look-alikes ----------------------------------------------------------------------------


def reads_detached_stash(m: Any, x: Tensor) -> Tensor:
    return plain(m, x + m.other.last.detach())


def keeps_detached(m: Any, x: Tensor) -> Tensor:
    before = getattr(m, "kept", None)
    h = plain(m, x if before is None else x + 0.1 * before.mean())
    m.kept = h.detach()
    return h


def keeps_live_unread(m: Any, x: Tensor) -> Tensor:
    m.kept = plain(m, x)  # for the user to look at
    return m.kept


def detached_buffer(m: Any, x: Tensor) -> Tensor:
    m.state.mul_(0.9).add_(plain(m, x).detach().mean(0))
    return plain(m, x) + m.state.clone()


def detached_weight(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.linear(x) + x @ m.other.linear.weight.detach())


def no_grad_right_line(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        extra = m.other.linear(x)
    return plain(m, x) + extra


def own_straight_through(m: Any, x: Tensor) -> Tensor:
    h = plain(m, x)
    return h + (torch.round(h) - h).detach()


def own_checkpoint_reentrant(m: Any, x: Tensor) -> Tensor:
    return checkpoint(m.linear, plain(m, x), use_reentrant=True)


def own_checkpoint(m: Any, x: Tensor) -> Tensor:
    return checkpoint(m.linear, x, use_reentrant=False)


def own_hook(m: Any, x: Tensor) -> Tensor:
    h = plain(m, x)
    if h.requires_grad:
        h.register_hook(lambda g: 0.5 * g)
    return h


def own_inplace(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h += 1.0
    return torch.tanh(h)


def own_data_clamp(m: Any, x: Tensor) -> Tensor:
    m.linear.weight.data.clamp_(-0.05, 0.05)
    return plain(m, x)


def own_custom_function(m: Any, x: Tensor) -> Tensor:
    return _Double.apply(plain(m, x))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2
