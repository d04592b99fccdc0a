"""Tangents: what a change of the values that a module reads makes of what it computes, to first order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from locc.ir import TensorSpec, TrainingGraph, inner, node_parameters, owned_tensor, strip, tape_of
from locc.ir.ops import call_quietly
from locc.ir.tape import changers
from locc.ir.view import draws
from locc.rewrite.dropout import is_dropout
from locc.rewrite.passes import UndefinedError


def before_nonlinearity(ir: TrainingGraph, value: fx.Node) -> fx.Node:
    """Return a value before what ends it: operations on one input, of its shape, without parameters."""
    while (source := _before(ir, value)) is not None:
        value = source
    return value


def pull(ir: TrainingGraph, value: fx.Node, gradient: fx.Node) -> fx.Node:
    """Return what a gradient of a module's value is `before_nonlinearity`; it is in that module, untaped."""
    owner = str(value.meta["owner"])
    while (source := _before(ir, value)) is not None:
        if value in changers(ir.graph).get(source, ()):
            gradient = _derived(ir, value, {source: gradient}, backward=True)
        else:
            gradient = ir.gradient(ir.emit(owner, inner, value, gradient, role="pulled"), source)
        value = source
    return gradient


def _before(ir: TrainingGraph, value: fx.Node) -> fx.Node | None:
    sources = value.all_input_nodes
    if len(sources) != 1 or value.meta["role"] == "boundary" or node_parameters(ir.root, value):
        return None
    (source,) = sources
    same = source.meta.get("spec") == value.meta["spec"]
    return source if same and source.op not in ("get_attr", "placeholder") else None


def push(ir: TrainingGraph, owner: str, moves: Mapping[fx.Node, fx.Node], end: fx.Node) -> fx.Node:
    """Return J v at `end`, for v at entries of a module, J as the forward pass of this step has it.

    Raises:
        UndefinedError: an operation between draws random numbers, or has no derivative in forward mode;
            compilation makes a refusal of it.
    """
    moved, needed = dict(moves), tape_of(end)
    for node in ir.nodes(owner):
        sources = [n for n in node.all_input_nodes if n in moved]
        if node in moved or node not in needed or not sources or not _differentiable(node):
            continue
        if is_dropout(ir, node) and sources[0] not in changers(ir.graph):
            (source,) = sources
            slope = ir.gradient(ir.emit(owner, torch.sum, node, role="sum"), source)
            moved[node] = ir.emit(owner, torch.mul, moved[source], slope, role="tangent")
        else:
            moved[node] = _derived(ir, node, moved)
    return ir.stop_gradient(owner, moved[end], role="tangent")


def _differentiable(node: fx.Node) -> bool:
    specs = tree_leaves(node.meta["spec"])
    return any(isinstance(spec, TensorSpec) and spec.differentiable for spec in specs)


def _derived(
    ir: TrainingGraph, node: fx.Node, moved: Mapping[fx.Node, fx.Node], *, backward: bool = False
) -> fx.Node:
    """Return the derivative of one operation, at what it has read, along tangents (or a gradient) of it."""
    owner, spec = node.meta["owner"], node.meta["spec"]
    along = fx.map_arg((node.args, node.kwargs), moved.get)
    given = fx.map_arg((node.args, node.kwargs), lambda n: _kept(ir, n) if n in moved else n)
    held = ir.read(owner, str(node.target), role="module") if node.op == "call_module" else None
    made = ir.emit(owner, Derivative(node.op, node.target, backward), held, given, along, role="tangent")
    if draws(ir.root, node) or made.meta["spec"] is None or made.meta["spec"] != spec:
        layer = owned_tensor(ir.root, str(node.target)) if node.op == "call_module" else node.target
        what = type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", layer)
        raise UndefinedError(
            f"'{strip(str(node.target))}' ({what}) of module '{owner}' draws random numbers, or has no "
            "derivative in forward mode, so no tangent passes it; end a module with it, or use another method"
        )
    return made


def _kept(ir: TrainingGraph, value: fx.Node) -> fx.Node:
    """Return a value, or, where the forward pass overwrites it, a copy from before that."""
    if value not in changers(ir.graph):
        return value
    if value.next.target is torch.clone and value.next.all_input_nodes == [value]:
        return value.next
    kept = ir.emit(value.meta["owner"], torch.clone, value, role="forward")
    value.append(kept)  # the forward keeps its order
    return kept


class Derivative:
    """The derivative of an operation: along tangents of its inputs, or `backward` of a gradient."""

    def __init__(self, op: str, target: Any, backward: bool) -> None:
        self.op, self.target, self.backward = op, target, backward
        self.__name__ = "back_through" if backward else "along"

    def __call__(self, module: nn.Module | None, given: Any, along: Any) -> Tensor:
        """Return J v or J' v, at the inputs `given`.

        Args:
            module: what is called, of an operation that is a module.
            given: its positional and named arguments.
            along: the same, with v in the place of the tensors that count, and None for the others.
        """
        flat, structure = tree_flatten(given)
        tangents, _ = tree_flatten(along)
        moving = [i for i, v in enumerate(tangents) if isinstance(v, Tensor)]

        def call(*values: Tensor) -> Any:
            now = list(flat)
            for i, value in zip(moving, values, strict=True):
                now[i] = value.clone()  # it may be changed in place
            args, kwargs = tree_unflatten(now, structure)
            if module is not None:
                return call_quietly(module, tuple(args), kwargs)
            function = getattr(args[0], self.target) if self.op == "call_method" else self.target
            return function(*args[self.op == "call_method" :], **kwargs)

        primals = tuple(flat[i].detach() for i in moving)
        if self.target not in ("as_strided", torch.as_strided):  # which reads memory as the forward has it
            # Forward mode writes tangents in the layout of these, and group_norm's takes views of them.
            primals = tuple(primal.contiguous() for primal in primals)
        moves = tuple(tangents[i].detach() for i in moving)
        found: Tensor
        if self.backward:
            found = torch.func.vjp(call, *primals)[1](*moves)[0].detach()
        else:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no derivative in forward mode
                found = torch.func.jvp(call, primals, moves)[1]
        return found
