"""Decisions of the opened code on values of the inputs: taken as for the example, checked on each batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from locc.capture.graphs import parents_of
from locc.capture.ledger import Ledger
from locc.capture.state import random_state, same_state
from locc.capture.targets import Constant

Evaluate = Callable[[Sequence[Tensor]], bool]
"""Takes the tensors of a call and returns what the code decides on them."""


class Reading:
    """A number read off a tensor (`x.item()`), which may be compared, and nothing else.

    Args:
        tensor: the fake tensor.
        decide: takes the fake tensor of a comparison and returns how it came out for the example.
        refuse: returns the refusal of any other use.
    """

    def __init__(
        self, tensor: Tensor, decide: Callable[[Tensor], bool], refuse: Callable[[], Exception]
    ) -> None:
        self.tensor, self.decide, self.refuse = tensor, decide, refuse

    __hash__ = None  # type: ignore[assignment]


def _comparison(function: Callable[[Any, Any], Any]) -> Any:
    def compare(self: Reading, other: Any) -> bool:
        return self.decide(function(self.tensor, other.tensor if isinstance(other, Reading) else other))

    return compare


def _refusal(self: Reading, *args: Any) -> Any:
    raise self.refuse()


for _name in (set(dir(int)) | set(dir(float))) - set(dir(object)):
    setattr(Reading, _name, _refusal)
for _name in ("__str__", "__repr__", "__format__"):
    setattr(Reading, _name, _refusal)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Reading, f"__{_name}__", _comparison(getattr(operator, _name)))
Reading.__bool__ = lambda self: self.decide(self.tensor != 0)  # type: ignore[attr-defined]


def evaluation(ledger: Ledger, value: fx.Node) -> tuple[Evaluate, set[int]] | None:
    """Return what recomputes the truth of `value` from the inputs, and which inputs that reads.

    None where closed modules, parameters or what the forward writes take part. What changes an argument in
    place runs again, on copies.
    """
    graph, known = ledger.graph, _known(ledger)
    if known is None or value not in known:
        return None
    needed = {value}
    for node in reversed(graph.nodes):
        if node in needed or (node in ledger.writers and node in known):
            needed |= {node, *known[node]}
    read = {i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder") if n in needed}
    own, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            size = None if all(n in copies for n in node.all_input_nodes) else ledger.size_of_input(node)
            copies[node] = (
                own.node_copy(node, copies.__getitem__)
                if size is None
                else own.call_method("size", (copies[size[0]], size[1]))
            )
    own.output(copies[value])

    def evaluate(tensors: Sequence[Tensor]) -> bool:
        with torch.no_grad():
            given = [t.detach().clone() if i in read else t for i, t in enumerate(tensors)]
            return bool(fx.Interpreter(ledger.root, graph=own).run(*given))

    return evaluate, read


def _known(ledger: Ledger) -> dict[fx.Node, list[fx.Node]] | None:
    """Return the nodes that follow from the inputs alone, each with what it is computed from.

    None where something else is written into them.
    """
    known: dict[fx.Node, list[fx.Node]] = {}
    for node in ledger.graph.nodes:
        sources = node.all_input_nodes
        free = _computes(ledger, node) and all(n in known for n in sources)
        size = None if free else ledger.size_of_input(node)
        held = any(n.op == "get_attr" or isinstance(n.target, Constant) for n in sources)
        if node in ledger.writers and any(n in known for n in sources) and (held or not free):
            return None
        if free:
            known[node] = sources
        elif size is not None:
            known[node] = [size[0]]
    return known


def _computes(ledger: Ledger, node: fx.Node) -> bool:
    if node.op == "get_attr":
        home = ledger.root.get_submodule(parents_of(str(node.target))[-1])
        held = getattr(home, str(node.target).rpartition(".")[2])
        return not isinstance(held, nn.Parameter) and not ledger.calls.is_leaf(home)
    return node.op in ("placeholder", "call_function", "call_method")


def answer(evaluate: Evaluate, tensors: Sequence[Tensor]) -> bool | None:
    """Return a decision in the middle of a trace on fake tensors; None where it is drawn at random."""
    with unset_fake_temporarily():
        before = random_state()
        found = evaluate(tensors)
        return found if same_state(before, random_state()) else None
