"""Further ways past a check, found by search: each is an act of `b` in a chain (see `leaks`)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .leaks import Act, InBackward, plain


def once(m: Any, act: Callable[[], object]) -> None:
    """Act in the first call on real tensors only."""
    if not m.__dict__.get("acted") and not m.linear.weight.is_meta:
        m.acted = True
        act()


def _writes(w: Tensor) -> None:
    w.grad = torch.ones_like(w)


# ---- hooks and custom backward passes ---------------------------------------------------------


def post_accumulate_hook(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    once(m, lambda: m.linear.weight.register_post_accumulate_grad_hook(lambda p: _writes(w)))
    return plain(m, x)


def multi_gradient_hook(m: Any, x: Tensor) -> Tensor:
    h, w = plain(m, x), m.other.linear.weight
    if h.requires_grad:
        torch.autograd.graph.register_multi_grad_hook((h,), lambda g: _writes(w))
    return h


def node_hook(m: Any, x: Tensor) -> Tensor:
    h, w = plain(m, x), m.other.linear.weight
    if h.grad_fn is not None:
        h.grad_fn.register_prehook(lambda g: _writes(w))
    return h


def module_backward_hook(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    once(m, lambda: m.linear.register_full_backward_hook(lambda module, *_: _writes(w)))
    return plain(m, x)


def saved_tensor_hook(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight

    def unpack(t: Tensor) -> Tensor:
        _writes(w)
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        return plain(m, x)


class _Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.layer(g.detach()).sum().backward()
        return g, None


def backward_in_backward(m: Any, x: Tensor) -> Tensor:
    return _Nested.apply(plain(m, x), m.other.linear)


def update_in_backward(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    return InBackward.apply(plain(m, x), lambda g: w.data.sub_(0.01 * g.mean()))


def clips_every_gradient(m: Any, x: Tensor) -> Tensor:
    """Does nothing while each gradient is dropped at once, but it does under accumulation."""
    h = plain(m, x)
    weights = [m.linear.weight, m.other.linear.weight]

    def clip(g: Tensor) -> None:
        for w in weights:
            if w.grad is not None:
                w.grad.mul_(0.5)

    if h.requires_grad:
        h.register_hook(clip)
    return h


def removes_gradient(m: Any, x: Tensor) -> Tensor:
    m.other.linear.weight.grad = None
    return plain(m, x)


def backward_in_forward(m: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        m.other.linear(x.detach()).sum().backward()
    return plain(m, x)


def thread(m: Any, x: Tensor) -> Tensor:
    worker = threading.Thread(target=_writes, args=(m.other.linear.weight,))
    worker.start()
    worker.join()
    return plain(m, x)


# ---- tapes ------------------------------------------------------------------------------------


def double_backward(m: Any, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return plain(m, x)
    w = m.other.linear.weight
    (g,) = torch.autograd.grad((x.detach() @ w).pow(2).sum(), w, create_graph=True)
    return plain(m, x) + x.detach() @ g


def vectorised(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    return plain(m, x) + torch.func.vmap(lambda row: w @ row)(x.detach())


def functional_call(m: Any, x: Tensor) -> Tensor:
    layer = m.other.linear
    return plain(m, x) + torch.func.functional_call(layer, dict(layer.named_parameters()), (x.detach(),))


def in_train_mode(m: Any, x: Tensor) -> Tensor:
    return plain(m, x + m.other.last) if m.training else plain(m, x)


def with_grad_enabled(m: Any, x: Tensor) -> Tensor:
    return plain(m, x + m.other.last) if torch.is_grad_enabled() else plain(m, x)


def on_real_tensors(m: Any, x: Tensor) -> Tensor:
    return plain(m, x) if type(x) is not Tensor or x.is_meta else plain(m, x + m.other.last)


# ---- state ------------------------------------------------------------------------------------


def numpy_view(m: Any, x: Tensor) -> Tensor:
    m.other.linear.weight.detach().numpy()[:] *= 0.99
    return plain(m, x)


def new_data(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    w.data = w.data * 0.99
    return plain(m, x)


def new_storage(m: Any, x: Tensor) -> Tensor:
    w = m.other.linear.weight
    with torch.no_grad():
        w.set_((w * 0.99).detach())
    return plain(m, x)


def freezes(m: Any, x: Tensor) -> Tensor:
    m.other.linear.weight.requires_grad_(False)
    return plain(m, x)


def replaces_parameter(m: Any, x: Tensor) -> Tensor:
    m.other.linear.weight = nn.Parameter(m.other.linear.weight.detach() * 0.99)
    return plain(m, x)


def replaces_module(m: Any, x: Tensor) -> Tensor:
    m.other.linear = copy.deepcopy(m.other.linear)
    return plain(m, x)


def replaces_buffer(m: Any, x: Tensor) -> Tensor:
    m.other.shared = m.other.shared + 1.0
    return plain(m, x)


def foreign_statistics(m: Any, x: Tensor) -> Tensor:
    functional.batch_norm(x, m.other.shared, torch.ones_like(m.other.shared), training=True)
    return plain(m, x)


def switches_mode(m: Any, x: Tensor) -> Tensor:
    m.other.training = not m.other.training
    return plain(m, x)


def foreign_attribute(m: Any, x: Tensor) -> Tensor:
    """Leaves its output, without a tape, where the earlier module finds it in the next step."""
    h = plain(m, x)
    m.other.arrived = h.detach()
    return h


def foreign_optimizer(m: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        optimizer = torch.optim.SGD(m.other.parameters(), lr=0.1)
        m.other.linear(x.detach()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain(m, x)


REACHES = "objective 'b.loss' of 'b' reaches parameter 'a.linear.weight', which module 'a' owns"
BACKWARD = "backward pass of objective 'b.loss' of 'b' {} parameter 'a.linear.weight', which module 'a' owns"
FORWARD = "the forward of 'b' {}, which module 'a' owns"
WRITES = BACKWARD.format("writes the gradient of")
ACTS: dict[Act, str] = {
    post_accumulate_hook: WRITES,
    multi_gradient_hook: WRITES,
    node_hook: WRITES,
    module_backward_hook: WRITES,
    saved_tensor_hook: WRITES,
    backward_in_backward: WRITES,
    update_in_backward: BACKWARD.format("changes"),
    clips_every_gradient: WRITES,
    removes_gradient: FORWARD.format("removes the gradient of parameter 'a.linear.weight'"),
    backward_in_forward: FORWARD.format("writes the gradient of parameter 'a.linear.weight'"),
    thread: FORWARD.format("writes the gradient of parameter 'a.linear.weight'"),
    double_backward: REACHES,
    vectorised: REACHES,
    functional_call: REACHES,
    in_train_mode: REACHES,
    with_grad_enabled: REACHES,
    on_real_tensors: REACHES,
    numpy_view: FORWARD.format("changes parameter 'a.linear.weight'"),
    new_data: FORWARD.format("changes parameter 'a.linear.weight'"),
    new_storage: FORWARD.format("changes parameter 'a.linear.weight'"),
    freezes: FORWARD.format("switches requires_grad of parameter 'a.linear.weight'"),
    replaces_parameter: FORWARD.format("replaces parameter 'a.linear.weight'"),
    replaces_module: FORWARD.format("replaces submodule 'a.linear'"),
    replaces_buffer: FORWARD.format("replaces buffer 'a.shared'"),
    foreign_statistics: FORWARD.format("changes buffer 'a.shared'"),
    switches_mode: FORWARD.format("replaces attribute 'a.training'"),
    foreign_attribute: FORWARD.format("replaces attribute 'a.arrived'"),
    foreign_optimizer: FORWARD.format("changes parameter 'a.linear.weight'"),
}
