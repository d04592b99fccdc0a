"""Mutations of what a node is labelled with: its owner, its region."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import fx

from locc.ir import TrainingGraph, ops
from locc.ir.view import DATA, node_parameters

from .sites import Site, calls, cuts, neighbours, on_graph, owner_of


def _computed(ir: TrainingGraph) -> list[fx.Node]:
    return [*calls(ir), *(n for n in ir.graph.nodes if n.op == "get_attr")]


def _to_neighbours(ir: TrainingGraph, nodes: list[fx.Node]) -> Iterator[Site]:
    for node in nodes:
        for other in neighbours(ir, owner_of(node)):
            yield f"{node.name} to '{other}'", partial(node.meta.update, owner=other)


@on_graph("swap the owner of a node")
def _owner_of_node(ir: TrainingGraph) -> Iterator[Site]:
    return _to_neighbours(ir, _computed(ir))


@on_graph("swap the owner of an objective")
def _owner_of_objective(ir: TrainingGraph) -> Iterator[Site]:
    return _to_neighbours(ir, ir.objectives())


@on_graph("swap the owner of a stop_gradient")
def _owner_of_cut(ir: TrainingGraph) -> Iterator[Site]:
    return _to_neighbours(ir, cuts(ir))


@on_graph("swap the owner of a gradient")
def _owner_of_gradient(ir: TrainingGraph) -> Iterator[Site]:
    return _to_neighbours(ir, ir.gradients())


@on_graph("give a node to the batch")
def _owner_is_data(ir: TrainingGraph) -> Iterator[Site]:
    for node in (*_computed(ir), *ir.objectives()):
        yield node.name, partial(node.meta.update, owner=DATA)


@on_graph("give a layer and all before it to the batch")
def _prefix_is_data(ir: TrainingGraph) -> Iterator[Site]:
    for node in calls(ir):
        if node_parameters(ir.root, node):
            yield node.name, partial(_give_away, node)


def _give_away(node: fx.Node) -> None:
    todo = [node]
    for step in todo:
        step.meta["owner"] = DATA
        todo += [s for s in step.all_input_nodes if s not in todo and s.target is not ops.stop_gradient]


# ---- repeated regions ------------------------------------------------------------------------


@on_graph("move a node out of its region")
def _out_of_region(ir: TrainingGraph) -> Iterator[Site]:
    for node in ir.graph.nodes:
        if node.meta.get("repeat"):
            yield node.name, partial(node.meta.update, repeat=None)


@on_graph("move a node into a region")
def _into_region(ir: TrainingGraph) -> Iterator[Site]:
    for name in ir.repeats:
        inside = {owner_of(n) for n in ir.graph.nodes if n.meta.get("repeat") == name}
        for node in (*calls(ir), *cuts(ir), *ir.gradients(), *ir.objectives()):
            if node.meta.get("repeat") != name and owner_of(node) in inside:
                yield f"{node.name} to {name}", partial(node.meta.update, repeat=name)


@on_graph("run a region once more")
def _once_more(ir: TrainingGraph) -> Iterator[Site]:
    for name, region in ir.repeats.items():
        yield name, partial(ir.repeats.update, {name: replace(region, times=region.times + 1)})


@on_graph("carry another value round a region")
def _carry_other(ir: TrainingGraph) -> Iterator[Site]:
    for name, region in ir.repeats.items():
        for i, (entry, end) in enumerate(region.carried):
            for other in calls(ir):
                if other is not end and other.meta["spec"] == end.meta["spec"]:
                    pairs = (*region.carried[:i], (entry, other), *region.carried[i + 1 :])
                    changed = {name: replace(region, carried=pairs)}
                    yield f"{entry.name} <- {other.name}", partial(ir.repeats.update, changed)
