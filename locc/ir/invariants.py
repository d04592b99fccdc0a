"""What holds of a training graph after every pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
import torch
from torch import fx

from locc.errors import GraphError, once
from locc.ir import ops
from locc.ir.captured import owned_tensor, strip
from locc.ir.graph import TrainingGraph
from locc.ir.memory import memory_of, overlap
from locc.ir.ops import Rebuild
from locc.ir.order import dependencies
from locc.ir.readers import touching
from locc.ir.structure import fingerprint
from locc.ir.tape import changers, tape_of
from locc.ir.view import DATA, node_parameters


def check(ir: TrainingGraph, after: str) -> None:
    """Check every invariant.

    Raises:
        GraphError: names the pass `after` which the graph is wrong, and every violation.
    """
    # The comparison with the captured model walks the graph, so it comes last: it needs a valid one.
    found = [problem for rule in RULES for problem in rule(ir)] or list(_inference_kept(ir))
    if found:
        raise GraphError(f"after '{after}' the training graph is invalid: " + once(found))


def _owned(ir: TrainingGraph) -> Iterator[str]:
    for node in ir.graph.nodes:
        owner = node.meta.get("owner")
        if node.op != "output" and owner != DATA and owner not in ir.owners:
            yield f"node '{node.name}' has no owner"


def _one_owner_each(ir: TrainingGraph) -> Iterator[str]:
    first: dict[int, tuple[str, str]] = {}
    for node in ir.graph.nodes:
        for path, parameter in node_parameters(ir.root, node):
            owner, where = first.setdefault(id(parameter), (node.meta["owner"], path))
            if owner != node.meta["owner"] and parameter.requires_grad:
                yield f"parameter '{strip(where)}' has two owners, '{owner}' and '{node.meta['owner']}'"


def _edges_cut(ir: TrainingGraph) -> Iterator[str]:
    for node in ir.graph.nodes:
        if node.op == "output" or node.target is ops.stop_gradient:
            continue
        for source in node.all_input_nodes:
            foreign = source.meta.get("owner") not in (node.meta["owner"], DATA)
            if foreign and source.target is not ops.gradient:
                yield (
                    f"'{node.name}' of '{node.meta['owner']}' reads '{source.name}' of "
                    f"'{source.meta.get('owner')}' without stop_gradient"
                )


def _gradients_local(ir: TrainingGraph) -> Iterator[str]:
    for node in ir.gradients():
        scalar, wrt = node.args
        assert isinstance(scalar, fx.Node)
        assert isinstance(wrt, fx.Node)
        if not scalar.meta["owner"] == wrt.meta["owner"] == node.meta["owner"]:
            yield f"gradient '{node.name}' mixes owners: '{scalar.name}' with respect to '{wrt.name}'"
        if wrt.op in ("get_attr", "placeholder"):
            yield (
                f"gradient '{node.name}' is taken with respect to '{wrt.name}', which is no value of the "
                "step; take it of a stop_gradient of that"
            )


def _objectives_train(ir: TrainingGraph) -> Iterator[str]:
    learns = {n for n in ir.graph.nodes if any(p.requires_grad for _, p in node_parameters(ir.root, n))}
    changed = changers(ir.graph)
    # A module that the user has frozen, and one that only borrows, may have an objective all the same.
    owners = {n.meta["owner"] for n in learns}
    for node in (n for n in ir.objectives() if n.meta["owner"] in owners):
        if learns.isdisjoint(tape_of(node, changed)):
            yield (
                f"objective '{node.meta['objective']}' reaches no parameter of '{node.meta['owner']}'; "
                "compute it from what the module computes, with no stop_gradient or whole number in between"
            )


def _objectives_once(ir: TrainingGraph) -> Iterator[str]:
    first: dict[fx.Node, str] = {}
    for node in ir.objectives():
        scalar, name = node.all_input_nodes[0], str(node.meta["objective"])
        if first.setdefault(scalar, name) != name:
            yield f"'{scalar.name}' is the objective '{first[scalar]}' and '{name}' as well; scale it instead"


def _assigns_own(ir: TrainingGraph) -> Iterator[str]:
    assigns = [n for n in ir.graph.nodes if n.target is ops.assign]
    touched = touching(ir.root, ir.graph.nodes) if assigns else {}
    assigned: dict[int, list[tuple[fx.Node, torch.Tensor]]] = {}
    for node in assigns:
        state, owner = node.all_input_nodes[0], node.meta["owner"]
        tensor = owned_tensor(ir.root, str(state.target)) if state.op == "get_attr" else None
        if not isinstance(tensor, torch.Tensor) or state.meta["owner"] != owner:
            yield f"assign '{node.name}' sets something that is not a state of '{owner}'"
            continue
        path, memory = strip(str(state.target)), memory_of(tensor)
        twin = next((n for n, t in assigned.get(memory, ()) if overlap(t, tensor)), None)
        if twin is not None:
            yield f"'{path}' is assigned twice, by '{twin.name}' and '{node.name}'"
        assigned.setdefault(memory, []).append((node, tensor))
        for other, held in touched.get(memory, ()):
            if overlap(held, tensor):
                yield from _misread(node, path, other)


def _misread(assign: fx.Node, path: str, reader: fx.Node) -> Iterator[str]:
    """Yield what is wrong with a read of what is assigned, by whatever path."""
    if reader.meta["owner"] != assign.meta["owner"]:
        yield (
            f"'{path}' is assigned by '{assign.meta['owner']}', and '{reader.name}' of "
            f"'{reader.meta['owner']}' reads it; bring it in with stop_gradient"
        )
    region = assign.meta.get("repeat")
    reading = reader.users if reader.op == "get_attr" else (reader,)
    outside = [n.name for n in reading if n.meta.get("repeat") != region and n.target is not ops.assign]
    if region and outside:
        yield (
            f"'{path}' is assigned in each round of region '{region}', and '{outside[0]}' reads it outside; "
            "carry the value through the rounds (ir.repeats) instead"
        )


def _entries_inside(ir: TrainingGraph) -> Iterator[str]:
    for region in ir.repeats.values():
        for entry, end in region.carried:
            inside = entry.meta.get("repeat") == end.meta.get("repeat") == region.name
            if not inside or entry.target is not ops.carry or entry.meta["owner"] != end.meta["owner"]:
                yield (
                    f"region '{region.name}' carries '{end.name}' of '{end.meta['owner']}' into "
                    f"'{entry.name}' of '{entry.meta['owner']}'; carry a value of the region into a carry of "
                    "the same owner"
                )
        for user, entry in ((u, e) for e, _ in region.carried for u in e.users):
            if user.meta.get("repeat") != region.name:
                yield (
                    f"'{user.name}' reads '{entry.name}', which has no value outside of region "
                    f"'{region.name}'; read what the region carries on"
                )


def _acyclic(ir: TrainingGraph) -> Iterator[str]:
    graph = dependencies(ir.graph)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(u.name for u, _ in nx.find_cycle(graph))
        yield f"the values have no valid order: {cycle}"


def _inference_kept(ir: TrainingGraph) -> Iterator[str]:
    if ir.folded:
        return
    values = ir.output.args if isinstance(ir.output.target, Rebuild) else (ir.output,)
    for graph, found in (
        (ir.captured.training, list(values)),
        (ir.captured.inference, _results(ir.inference)),
    ):
        if fingerprint(_results(graph)) != fingerprint(found):
            yield "the inference path no longer computes the captured model"


def _results(graph: fx.Graph) -> list[Any]:
    end = next(iter(reversed(graph.nodes)))
    return list(end.args[0]) if isinstance(end.args[0], (tuple, list)) else [end.args[0]]


RULES = (
    _owned,
    _one_owner_each,
    _edges_cut,
    _gradients_local,
    _objectives_train,
    _objectives_once,
    _assigns_own,
    _entries_inside,
    _acyclic,
)
