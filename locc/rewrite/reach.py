"""Reach: which values depend on what the network learns."""

from __future__ import annotations

from torch import fx

from locc.ir import TrainingGraph, node_parameters, tape_of


def learned(ir: TrainingGraph, frozen: bool = False) -> set[fx.Node]:
    """Return the nodes through which a gradient may reach a parameter, across boundaries too.

    Args:
        ir: the training graph, in program order.
        frozen: whether parameters that do not train count as well.
    """
    found: set[fx.Node] = set()
    for node in ir.graph.nodes:
        if node.op == "call_method" and node.target == "detach":
            continue  # what the model itself detaches (or computes under no_grad) learns nothing
        own = any(frozen or p.requires_grad for _, p in node_parameters(ir.root, node))
        if own or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def leads_to(value: fx.Node, prediction: fx.Node) -> bool:
    """Whether a prediction is computed from a value, across boundaries too."""
    todo, seen = [prediction], {prediction}
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in seen]
        seen.update(new)
        todo.extend(new)
    return value in seen


def trained(ir: TrainingGraph, value: fx.Node) -> bool:
    """Whether a gradient of a value reaches a parameter that trains, in the value's own module."""
    return any(p.requires_grad for node in tape_of(value) for _, p in node_parameters(ir.root, node))
