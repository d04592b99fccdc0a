"""What holds of a training graph after every pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
from torch import fx

from locc.errors import GraphError
from locc.ir import ops
from locc.ir.captured import strip
from locc.ir.graph import TrainingGraph
from locc.ir.ops import Rebuild
from locc.ir.order import dependencies
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
        raise GraphError(f"after '{after}' the training graph is invalid: " + "; ".join(found))


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
    changed = changers(ir.graph)
    for node in ir.objectives():
        owner = node.meta["owner"]
        if not any(p.requires_grad for p in ir.parameters(owner).values()):
            continue  # a module that the user has frozen, or one that only borrows
        tape = tape_of(node, changed)
        held = {n for n in tape if n.op == "get_attr"} | tape
        if not any(p.requires_grad for n in held for _, p in node_parameters(ir.root, n)):
            yield (
                f"objective '{node.meta['objective']}' reaches no parameter of '{owner}'; compute it from "
                "what the module computes, without a stop_gradient in between"
            )


def _objectives_once(ir: TrainingGraph) -> Iterator[str]:
    first: dict[fx.Node, str] = {}
    for node in ir.objectives():
        scalar, name = node.all_input_nodes[0], str(node.meta["objective"])
        if first.setdefault(scalar, name) != name:
            yield f"'{scalar.name}' is the objective '{first[scalar]}' and '{name}' as well; scale it instead"


def _assigns_own(ir: TrainingGraph) -> Iterator[str]:
    assigned: dict[str, fx.Node] = {}
    for node in ir.graph.nodes:
        if node.target is not ops.assign:
            continue
        state = node.args[0]
        if (
            not isinstance(state, fx.Node)
            or state.op != "get_attr"
            or state.meta["owner"] != node.meta["owner"]
        ):
            yield f"assign '{node.name}' sets something that is not a state of '{node.meta['owner']}'"
            continue
        path, region = str(state.target), node.meta.get("repeat")
        if path in assigned:
            yield f"'{strip(path)}' is assigned twice, by '{assigned[path].name}' and '{node.name}'"
        assigned[path] = node
        outside = [u.name for u in state.users if u.meta.get("repeat") != region] if region else []
        if outside:
            yield (
                f"'{strip(path)}' is assigned in each round of region '{region}', and '{outside[0]}' reads "
                "it outside; carry the value through the rounds (ir.repeats) instead"
            )


def _entries_inside(ir: TrainingGraph) -> Iterator[str]:
    for region in ir.repeats.values():
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
