"""How values pass from one step to the next, and how old they are."""

from __future__ import annotations

import math

import torch
from torch import fx

from locc.ir import ops
from locc.ir.captured import owned_tensor
from locc.ir.memory import memory_of
from locc.ir.state import State
from locc.ir.view import View, node_tensors


def held(ir: View) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each read of what an `assign` sets, the values that it was set to in the step before.

    Of buffers and states alone: a parameter is what a rule learns, and not a value that travels.
    """
    written: dict[int, list[fx.Node]] = {}
    for node in ir.graph.nodes:
        if node.target is ops.assign:
            target, value = node.all_input_nodes[0], node.all_input_nodes[-1]
            for _, tensor in node_tensors(ir.root, target):
                if not isinstance(tensor, torch.nn.Parameter):
                    written.setdefault(memory_of(tensor), []).append(value)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in ir.graph.nodes if written else ():
        values = [v for tensor in _read(ir, node) for v in written.get(memory_of(tensor), ())]
        if values:
            found[node] = list(dict.fromkeys(values))
    return found


def _read(ir: View, node: fx.Node) -> list[torch.Tensor]:
    """Return the tensors whose value of before the step a node reads; a state that a flag renews is one."""
    if node.op not in ("get_attr", "call_module") and "state" in node.meta:
        state = owned_tensor(ir.root, node.meta["state"])
        return [state.value] if isinstance(state, State) else []
    return [tensor for _, tensor in node_tensors(ir.root, node)]


def ages(ir: View) -> dict[fx.Node, int]:
    """Return how many steps ago the newest data came from which each value is computed.

    What is read from the state that the last step left is a step older than what it was set to; parameters
    and constants have no age.
    """
    earlier = held(ir)
    found: dict[fx.Node, float] = {}
    changed = True
    while changed:
        changed = False
        for node in ir.graph.nodes:
            if node in earlier:
                age = 1 + min(found.get(v, math.inf) for v in earlier[node])
            elif node.op == "placeholder":
                age = 0
            else:
                age = min((found.get(s, math.inf) for s in node.all_input_nodes), default=math.inf)
            changed |= age < found.get(node, math.inf)
            found[node] = min(age, found.get(node, math.inf))
    return {node: 0 if math.isinf(age) else int(age) for node, age in found.items()}
