"""Updates within the backward pass: where they are the same as updates after it, and in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from locc.errors import MethodError
from locc.ir import Phase, TrainingGraph
from locc.lower import Backward, Plan, Update, every_plan, instructions_of


def check(ir: TrainingGraph, phases: Iterable[Phase], name: str) -> None:
    """Refuse a program in which something runs between a backward pass and the update that it leads to.

    Raises:
        MethodError: names the module.
    """
    for plan in every_plan(ir, phases):
        _check(plan, name)


def _check(plan: Plan, name: str) -> None:
    before = {id(update): one for one, update in pairwise(plan.instructions)}
    backwards = [b for b in instructions_of(plan.instructions) if isinstance(b, Backward) and b.objectives]
    for update in (i for i in plan.instructions if isinstance(i, Update)):
        passes = [b for b in backwards if b.owner == update.owner]
        if len(passes) == 1 and before[id(update)] is passes[0]:
            continue
        why = f"it has {len(passes)} objectives, whose gradients add up"
        if len(passes) == 1:
            why = "its parameters, as they were before the step, are read once more after its backward pass"
        raise MethodError(
            f"update='in_backward' changes a parameter before the backward pass is over, and with method "
            f"'{name}' module '{update.owner}' has to wait: {why}; use update='after_backward'"
        )


def weight_first(layer: nn.Linear, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward of a linear layer that lets go of its input before it makes that one's gradient.

    PyTorch's own holds both, and the gradient of the weight. The bits are the same.
    """

    def run(x: Any) -> Any:
        plain = (
            all(type(t) in (Tensor, nn.Parameter) and not t.is_nested for t in (x, layer.weight))
            and x.dim() > 1
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and torch._C._functorch.peek_interpreter_stack() is None
            and forward_ad._current_level < 0
        )
        if not plain:
            return forward(x)
        return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]

    return run


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        made = F.linear(x, weight, bias)
        # Of sequences it is a view, which what follows could not change in place.
        return torch.ops.aten._unsafe_view(made, made.shape) if made._is_view() else made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        shape, rows = x.shape, gradient.reshape(-1, gradient.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        found = rows.t().mm(x.reshape(-1, shape[-1])) if of_weight else None
        # PyTorch makes a matrix of an input that lies in one piece alone, and sums as it has multiplied.
        added = rows if x.is_contiguous() else gradient
        summed = added.sum(tuple(range(added.dim() - 1))) if of_bias else None
        del x
        ctx.maybe_clear_saved_tensors()
        return rows.mm(weight).reshape(shape) if of_x else None, found, summed
