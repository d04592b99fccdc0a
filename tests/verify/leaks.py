"""What code behind the graph's back can do to another module, each with a harmless twin.

An act runs as the forward of a module `m` on `x`; `m.other` is an earlier module, whose weight is
`m.other.linear.weight`, whose buffer is `m.other.shared` and which keeps its live output on `m.other.last`.
Where a twin is `OWN`, it is the same act with `m.other` being `m` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import locc
from locc import Program
from locc.proof.findings import SENTINEL, WALK
from locc.rewrite import Method

Act = Callable[[Any, Tensor], Tensor]


class Leaf(nn.Module):
    """A linear layer and tanh; keeps what it computed, live, for anybody who asks."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.last: Tensor | None = None
        self.register_buffer("shared", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.last = plain(self, x)
        return self.last


class Planted(Leaf):
    """A leaf whose forward is an act on `other` (itself without one), while it is active."""

    def __init__(self, act: Act, other: nn.Module | None, width: int = 4) -> None:
        super().__init__(width)
        self.act = act
        self.others = (other,)  # in a tuple, so that it is not registered as a submodule
        self.active = True
        self.register_buffer("state", torch.zeros(width))

    @property
    def other(self) -> Any:
        return self if self.others[0] is None else self.others[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x) if self.active else plain(self, x)


class Chain(nn.Module):
    """a -> b -> c -> head; `b` is planted."""

    def __init__(self, act: Act, own: bool = False, first: nn.Module | None = None, width: int = 4) -> None:
        super().__init__()
        self.a = first or Leaf(width)
        self.b = Planted(act, None if own else self.a, width)
        self.c = Leaf(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


def chain(act: Act | None = None, first: nn.Module | None = None, **options: Any) -> Chain:
    """A chain with the same weights each time."""
    torch.manual_seed(0)
    return Chain(act or plain, first=first, **options)


def compiled(model: Chain, method: str | Method = "dgl", **options: Any) -> Program:
    x = torch.randn(4, model.head.in_features, generator=torch.Generator().manual_seed(1))
    return locc.compile(model, method, ["a", "b", "c"], example_inputs=x, **options)


def plain(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.linear(x))


# ---- live values ----------------------------------------------------------------------------


def reads_stash(m: Any, x: Tensor) -> Tensor:
    return plain(m, x + m.other.last)


def reads_detached_stash(m: Any, x: Tensor) -> Tensor:
    return plain(m, x + m.other.last.detach())


def reads_previous_stash(m: Any, x: Tensor) -> Tensor:
    before = getattr(m, "kept", None)
    h = plain(m, x if before is None else x + 0.1 * before.mean())
    m.kept = h
    return h


def keeps_detached(m: Any, x: Tensor) -> Tensor:
    before = getattr(m, "kept", None)
    h = plain(m, x if before is None else x + 0.1 * before.mean())
    m.kept = h.detach()
    return h


def reads_foreign_previous(m: Any, x: Tensor) -> Tensor:
    before = getattr(m, "kept", None)
    m.kept = m.other.last
    return plain(m, x if before is None else x + 0.1 * before.mean())


def keeps_foreign_detached(m: Any, x: Tensor) -> Tensor:
    before = getattr(m, "kept", None)
    m.kept = m.other.last.detach()
    return plain(m, x if before is None else x + 0.1 * before.mean())


def keeps_live_unread(m: Any, x: Tensor) -> Tensor:
    m.kept = plain(m, x)  # for the user to look at
    return m.kept


def live_buffer(m: Any, x: Tensor) -> Tensor:
    m.state = m.other.last.mean(0)
    return plain(m, x + m.state)


def detached_buffer(m: Any, x: Tensor) -> Tensor:
    m.state = m.other.last.detach().mean(0)
    return plain(m, x + m.state)


def history_buffer(m: Any, x: Tensor) -> Tensor:
    m.state = 0.9 * m.state + plain(m, x).mean(0)
    return plain(m, x) + m.state


def detached_history(m: Any, x: Tensor) -> Tensor:
    m.state.mul_(0.9).add_(plain(m, x).detach().mean(0))
    return plain(m, x) + m.state.clone()


def foreign_weight(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.linear(x) + x @ m.other.linear.weight.t()[:, :4])


def foreign_module(m: Any, x: Tensor) -> Tensor:
    return plain(m, x) + m.other.linear(x.detach())


def no_grad_wrong_line(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    with torch.no_grad():
        scale = w.norm()
    return plain(m, x) + (w / scale).mean()


def no_grad_right_line(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    with torch.no_grad():
        extra = (w / w.norm()).mean()
    return plain(m, x) + extra


def straight_through(m: Any, x: Tensor) -> Tensor:
    live = m.other.last
    return plain(m, x + (torch.round(live) - live).detach() + live)


def own_straight_through(m: Any, x: Tensor) -> Tensor:
    live = plain(m, x)
    return live + (torch.round(live) - live).detach()


def inplace_after_detach(m: Any, x: Tensor) -> Tensor:
    x = x.detach().clone()
    x += m.other.last
    return plain(m, x)


def inplace_of_detached(m: Any, x: Tensor) -> Tensor:
    x = x.detach().clone()
    x += m.other.last.detach()
    return plain(m, x)


def view_copy_after_detach(m: Any, x: Tensor) -> Tensor:
    x = x.detach().clone()
    x[:, 0].copy_(m.other.last[:, 0])
    return plain(m, x)


def view_copy_of_detached(m: Any, x: Tensor) -> Tensor:
    x = x.detach().clone()
    x[:, 0].copy_(m.other.last[:, 0].detach())
    return plain(m, x)


def checkpoint_reentrant(m: Any, x: Tensor) -> Tensor:
    """The parameters inside are not on the outer tape."""
    return plain(m, x) + checkpoint(m.other.linear, plain(m, x), use_reentrant=True)


def checkpoint_non_reentrant(m: Any, x: Tensor) -> Tensor:
    return plain(m, x) + checkpoint(m.other.linear, x, use_reentrant=False)


# ---- gradients and values that are written --------------------------------------------------


class InBackward(torch.autograd.Function):
    """Leaves the value as it is and calls `act` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Callable[[Tensor], object]) -> Tensor:
        ctx.act = act
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.act(g)
        return g, None


def _write_gradient(w: Tensor, g: Tensor) -> None:
    w.grad = torch.full_like(w, g.mean().item())


def custom_function(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    return InBackward.apply(plain(m, x), lambda g: _write_gradient(w, g))


def tensor_hook(m: Any, x: Tensor) -> Tensor:
    h, w = plain(m, x), m.other.linear.weight
    if h.requires_grad:

        def write(g: Tensor) -> None:
            w.grad = torch.ones_like(w) * g.sum().item()

        h.register_hook(write)
    return h


def scaling_hook(m: Any, x: Tensor) -> Tensor:
    h = plain(m, x)
    if h.requires_grad:
        h.register_hook(lambda g: 0.5 * g)
    return h


def forward_write(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    w.grad = torch.ones_like(w)
    return plain(m, x)


def data_alias_parameter(m: Any, x: Tensor) -> Tensor:
    m.other.linear.weight.data.mul_(0.99)
    return plain(m, x)


def data_alias_activation(m: Any, x: Tensor) -> Tensor:
    x.data.add_(1.0)
    return plain(m, x)


def own_data_alias_activation(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h.data.add_(1.0)
    return torch.tanh(h)


def foreign_buffer(m: Any, x: Tensor) -> Tensor:
    m.other.shared.add_(1.0)
    return plain(m, x)


def own_inplace(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h += 1.0
    return torch.tanh(h)


# ---- the table ------------------------------------------------------------------------------


OWN = None
REACHES = "objective 'b.loss' of 'b' reaches parameter 'a.linear.weight', which module 'a' owns"
STALE = "objective 'b.loss' of 'b' reaches the tape of 'b' in an earlier step"
BACKWARD = (
    "backward pass of objective 'b.loss' of 'b' writes the gradient of parameter 'a.linear.weight', "
    "which module 'a' owns"
)


@dataclass(frozen=True)
class Leak:
    """An act, the check that must see it first, what the message must say, and what looks like it."""

    act: Act
    check: str
    text: str
    twin: Act | None = OWN

    @property
    def harmless(self) -> Act:
        return self.twin or self.act


LEAKS = {
    leak.act.__name__: leak
    for leak in (
        Leak(reads_stash, WALK, REACHES, reads_detached_stash),
        Leak(reads_previous_stash, WALK, STALE, keeps_detached),
        Leak(
            reads_foreign_previous,
            WALK,
            REACHES + ", through a value that was kept from an earlier step",
            keeps_foreign_detached,
        ),
        Leak(live_buffer, WALK, REACHES, detached_buffer),
        Leak(history_buffer, WALK, STALE, detached_history),
        Leak(foreign_weight, WALK, REACHES),
        Leak(foreign_module, WALK, REACHES),
        Leak(no_grad_wrong_line, WALK, REACHES, no_grad_right_line),
        Leak(straight_through, WALK, REACHES, own_straight_through),
        Leak(inplace_after_detach, WALK, REACHES, inplace_of_detached),
        Leak(view_copy_after_detach, WALK, REACHES, view_copy_of_detached),
        Leak(checkpoint_non_reentrant, WALK, REACHES),
        Leak(checkpoint_reentrant, SENTINEL, BACKWARD),
        Leak(custom_function, SENTINEL, BACKWARD),
        Leak(tensor_hook, SENTINEL, BACKWARD),
        Leak(forward_write, SENTINEL, "forward of 'b' writes the gradient of parameter 'a.linear.weight'"),
        Leak(
            data_alias_parameter,
            SENTINEL,
            "forward of 'b' changes parameter 'a.linear.weight', which module 'a' owns",
        ),
        Leak(
            data_alias_activation,
            SENTINEL,
            "forward of 'b' changes 'a', a value of 'a', in place",
            own_data_alias_activation,
        ),
        Leak(foreign_buffer, SENTINEL, "forward of 'b' changes buffer '{shared}', which module 'a' owns"),
    )
}
HARMLESS = (keeps_live_unread, scaling_hook, own_inplace)
"""Look-alikes that are nobody's twin."""
