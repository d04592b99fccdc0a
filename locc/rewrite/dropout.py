"""Dropout that ends a module: what enters it, for methods whose objectives read that."""

from __future__ import annotations

import torch
from torch import fx, nn

from locc.ir import TrainingGraph
from locc.ir.calls import Switched

_DROPOUTS = {
    getattr(home, name)
    for home in (torch, nn.functional)
    for name in (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
        *("feature_dropout", "dropout_", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_"),
    )
    if hasattr(home, name)
}


def is_dropout(ir: TrainingGraph, node: fx.Node) -> bool:
    """Whether a node is an `nn.Dropout*` leaf or a call of a dropout function."""
    if node.op == "call_module":
        return isinstance(ir.root.get_submodule(str(node.target)), nn.modules.dropout._DropoutNd)
    target = node.target.function if isinstance(node.target, Switched) else node.target
    return node.op == "call_function" and target in _DROPOUTS


def before_dropout(ir: TrainingGraph, value: fx.Node) -> fx.Node:
    """Return the value before the dropout that ends its module, or the value itself where none does.

    Recognised is dropout whose result is the boundary value itself: nothing may follow it in the module.
    Where it works in place it is given a copy, so that the value before it survives.
    """
    while is_dropout(ir, value):
        source = value.args[0] if value.args else value.kwargs.get("input")
        if not isinstance(source, fx.Node) or source.meta["owner"] != value.meta["owner"]:
            return value
        if source.target is torch.clone and source.meta["role"] == "copy":
            source = source.all_input_nodes[0]  # the copy of an earlier pass
        elif in_place(ir, value):
            if len(source.users) > 1:
                return value
            give_copy(ir, value, source)
        value = source
    return value


def give_copy(ir: TrainingGraph, node: fx.Node, source: fx.Node) -> None:
    """Let a node that works in place work on a copy of `source`, which survives."""
    copy = ir.emit(str(source.meta["owner"]), torch.clone, source, role="copy")
    node.replace_input_with(source, copy)
    if "mutates" in node.meta:
        node.meta["mutates"] = tuple(copy if n is source else n for n in node.meta["mutates"])


def in_place(ir: TrainingGraph, node: fx.Node) -> bool:
    """Whether a node changes what it reads."""
    if "mutates" in node.meta:
        return True
    if node.op == "call_module":
        return bool(getattr(ir.root.get_submodule(str(node.target)), "inplace", False))
    return bool(node.kwargs.get("inplace", False)) or getattr(node.target, "__name__", "").endswith("_")
