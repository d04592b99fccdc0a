"""A network to export: a flat graph with named, typed inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from locc import files
from locc.export.samples import Sample
from locc.ir import TensorSpec
from locc.markers import split

LARGE = 1_500_000_000
"""Bytes from which on weights go into a file of their own; protobuf ends at 2 GiB."""


@dataclass
class Network:
    """What one ONNX file is to compute.

    Attributes:
        module: takes flat tensors, returns a tuple of flat tensors.
        trace: inputs for the exporters to run it on.
        samples: what the file must reproduce.
        dynamic: whether the batch dimension is left open.
    """

    module: nn.Module
    inputs: list[str]
    input_specs: list[TensorSpec]
    outputs: list[str]
    output_specs: list[TensorSpec]
    trace: list[Tensor]
    samples: list[Sample] = field(default_factory=list)
    dynamic: bool = True

    @property
    def large(self) -> bool:
        """Whether the weights are not to be copied: they exceed `LARGE`, or are in files (`offload=`)."""
        weights = [*self.module.parameters(), *self.module.buffers()]
        return sum(t.nbytes for t in weights) > LARGE or any(map(files.lies, weights))


def graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a runnable copy of a flat graph, in a form that any exporter takes.

    Split markers are gone, every output is a value of its own, and inputs that something changes in place
    are copied.
    """
    copied = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is split:
            made[node] = made[_node(node.args[0])]
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            copied.output(tuple(_separate(copied, [made[_node(r)] for r in results])))
        else:
            made[node] = copied.node_copy(node, lambda n: made[n])
    if any("mutates" in node.meta for node in graph.nodes):
        _protect_inputs(copied)
    _drop_unused(copied)
    return fx.GraphModule(root, copied)


def _separate(graph: fx.Graph, results: Sequence[fx.Node]) -> list[fx.Node]:
    """Copy outputs that are inputs or parameters, or that appear twice."""
    seen: set[fx.Node] = set()
    found = []
    for result in results:
        if result in seen or result.op in ("placeholder", "get_attr"):
            result = graph.call_function(torch.clone, (result,))
        seen.add(result)
        found.append(result)
    return found


def _protect_inputs(graph: fx.Graph) -> None:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        with graph.inserting_after(inputs[-1]):
            private = graph.call_function(torch.clone, (node,))
        node.replace_all_uses_with(private, delete_user_cb=lambda user, own=private: user is not own)


def _drop_unused(graph: fx.Graph) -> None:
    """Erase reads and sizes that nothing uses; calls may have effects on what others read."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or (node.op == "call_method" and node.target == "size")):
            graph.erase_node(node)


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
