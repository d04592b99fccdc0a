"""The memory format of what enters a module, where PyTorch cannot take every one."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from locc.ir import TrainingGraph, ops, owned_tensor

_FUNCTIONS = (torch.group_norm, nn.functional.group_norm)


def row_major(x: Tensor) -> Tensor:
    """Return `x` in row-major order: `x` itself, where it is or where it is not on the CPU."""
    return x.contiguous() if x.device.type == "cpu" else x


def guard_group_norms(ir: TrainingGraph) -> None:
    """Let group normalisations read what enters a module in row-major order, where it needs no gradient.

    For an input in `torch.channels_last` that needs none, their backward pass on the CPU ends the process
    (a segmentation fault, torch 2.13). A value that is in row-major order is not copied. One that a
    gradient is taken to stays as it is, so `bp` computes with the model's own layouts.
    """
    taught = {node.args[1] for node in ir.graph.nodes if node.target is ops.gradient}
    with ir.making("guard_group_norms"):
        for node in list(ir.graph.nodes):
            if node.target is ops.stop_gradient and node not in taught and _normalised(ir, node):
                made = ir.emit(node.meta["owner"], row_major, node, role="copy")
                node.replace_all_uses_with(made, lambda user, made=made: user is not made)
    ir.tidy()


def _normalised(ir: TrainingGraph, node: fx.Node) -> bool:
    """Whether a value reaches a group normalisation before anything else that has parameters."""
    todo = list(node.users)
    for user in todo:
        module = owned_tensor(ir.root, str(user.target)) if user.op == "call_module" else None
        held = list(module.modules()) if isinstance(module, nn.Module) else []
        if user.target in _FUNCTIONS or any(isinstance(m, nn.GroupNorm) for m in held):
            return True
        if user.target not in ops.OPS and not any(m._parameters for m in held):
            todo += [n for n in user.users if n not in todo]
    return False
