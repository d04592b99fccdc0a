"""Disturbs one objective of a program, and reads off its certificate whom that may reach."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from locc.ir.view import DATA
from locc.lower import Backward, Instruction, Loop, Plan, Segment
from locc.proof import Certificate

FORWARD = frozenset({"activation", "input", "label", "synthetic gradient"})
"""Kinds of flows whose values no objective changes before its owner's update."""


class _Scaled(torch.autograd.Function):
    """Leaves the value as it is and multiplies its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _tripled(scalar: Tensor) -> Tensor:
    return _Scaled.apply(scalar, 3.0)  # type: ignore[no-any-return, no-untyped-call]


def _poisoned(scalar: Tensor) -> Tensor:
    return _Scaled.apply(scalar, float("nan"))  # type: ignore[no-any-return, no-untyped-call]


DISTURBANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "its gradient times 3": _tripled,
    "its gradient deleted": Tensor.detach,
    "a NaN in its gradient": _poisoned,
}
"""What is done to the scalar of an objective: its value stays, so that no step is stopped."""


def disturbed(plan: Plan, task: Backward, change: Callable[[Tensor], Tensor]) -> Plan:
    """Return a plan in which the gradient of one objective is another."""
    return replace(plan, instructions=_disturbed(plan.instructions, task, change))


def _disturbed(
    instructions: list[Instruction], task: Backward, change: Callable[[Tensor], Tensor]
) -> list[Instruction]:
    found: list[Instruction] = []
    for instruction in instructions:
        if isinstance(instruction, Loop):
            found.append(replace(instruction, body=_disturbed(instruction.body, task, change)))
        elif instruction is task:
            name = f"disturbed {task.scalar}"  # a new name: others may read the scalar itself
            found += [
                Segment(task.owner, True, lambda _, s: (change(s),), (), (task.scalar,), (name,)),
                replace(task, scalar=name, frees=(*task.frees, name)),
            ]
        else:
            found.append(instruction)
    return found


def reached_at_once(certificate: Certificate, owner: str) -> set[str]:
    """Return the owners that an objective may change in the same step, by the certificate.

    Those are the ends of flows that start at its owner with a value that a gradient can change.
    """
    graph = _flows(certificate)
    starts = {f.consumer for f in certificate.leaving(owner) if f.kind not in FORWARD}
    return starts.union(*(nx.descendants(graph, s) for s in starts)) if starts else set()


def reached_later(certificate: Certificate, owner: str) -> set[str]:
    """Return the owners that an objective may change in the next step, by the certificate.

    Those are the ends of any flows that start at its owner, whose parameters are others by then, and
    the owners that share state with one of them.
    """
    graph = _flows(certificate)
    for coupling in certificate.couplings:
        graph.add_edges_from(itertools.permutations(coupling.owners, 2))
    return set(nx.descendants(graph, owner))


def _flows(certificate: Certificate) -> nx.DiGraph[str]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(o.name for o in certificate.owners)
    graph.add_edges_from((f.producer, f.consumer) for f in certificate.flows if f.producer != DATA)
    return graph
