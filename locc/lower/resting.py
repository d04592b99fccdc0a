"""Cuts a phase's step in two: what rests and depends on the batch alone, and what trains on its values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from locc.ir import Coupling, Phase, TrainingGraph, ops
from locc.ir.view import node_modules, node_tensors
from locc.lower.instructions import Plan, Receive, Segment, Send, instructions_of
from locc.lower.project import project
from locc.lower.tasks import needed_nodes


@dataclass(frozen=True)
class Resting:
    """Two programs that one after the other are a step.

    Attributes:
        first: of owners at rest: the same samples give the same values while the phase lasts.
        then: of all others, which receives what `first` sends.
        tensors: the parameters and buffers of which the values of `first` are made.
    """

    first: Plan
    then: Plan
    tensors: tuple[Tensor, ...]

    @property
    def sent(self) -> tuple[Send, ...]:
        """What the first hands to the second."""
        return tuple(i for i in self.first.instructions if isinstance(i, Send))


def runs_frozen(ir: TrainingGraph, phase: Phase) -> bool:
    """Whether a step of a phase computes something of an owner that it freezes."""
    frozen = phase.freezes(ir.owners)
    return any(n.meta.get("owner") in frozen for n in needed_nodes(ir, frozenset(phase.trains)))


def at_rest(ir: TrainingGraph, plan: Plan, phase: Phase, coupled: Iterable[Coupling]) -> Resting | str | None:
    """Return the largest part of a phase's plan that depends on the batch alone, with the rest.

    Args:
        ir: the training graph.
        plan: of the phase.
        phase: says who trains and who is in eval mode.
        coupled: what owners share.

    Returns:
        The two programs; None where no owner that runs is frozen; a sentence where none of those qualifies.
    """
    frozen = [o for o in plan.runs if o in phase.freezes(ir.owners)]
    needed = needed_nodes(ir, frozenset(phase.trains))
    nodes = {o: [n for n in ir.nodes(o) if n in needed] for o in frozen}
    why = {o: found for o in frozen if (found := _does_more(ir, plan, o, nodes[o]))}
    sources = {o: _sources(plan, o) for o in frozen}
    live = [set(c.owners) for c in coupled if c.live]
    while True:
        rests = [o for o in frozen if o not in why]
        for owner in rests:
            outside = sources[owner].union(*(who for who in live if owner in who)).difference(rests)
            if outside:
                why[owner] = f"'{owner}', at rest, depends on '{min(outside)}', which is not"
                break
        else:
            break
    if not rests:
        return why[frozen[0]] if frozen else None
    tensors = [t for o in rests for n in nodes[o] for _, t in node_tensors(ir.root, n)]
    others = [o for o in plan.runs if o not in rests]
    once = {id(t): t for t in tensors}
    return Resting(project(plan, rests), project(plan, others), tuple(once.values()))


def _does_more(ir: TrainingGraph, plan: Plan, owner: str, nodes: list[fx.Node]) -> str | None:
    """Say what an owner at rest does beside computing values of samples, if anything."""
    for instruction in plan.instructions:
        inside = [i for i in instructions_of([instruction]) if i.owner == owner]
        if inside and not isinstance(instruction, Segment):
            kind = type(inside[-1]).__name__.lower()
            return f"'{owner}', at rest, does more than compute values of samples ({kind})"
        if plan.loss in instruction.writes and inside:
            return f"'{owner}', at rest, computes the loss, which is reported of every step"
    for node in nodes:
        if "state" in node.meta or node.target is ops.assign:
            return f"'{owner}', at rest, keeps '{node.name}' from step to step"
        call = node.args[0] if node.target is ops.call_with else node
        quiet = isinstance(call, fx.Node) and bool(node_modules(ir.root, call))  # in eval mode
        if node.meta.get("random") and not quiet:
            return f"'{owner}', at rest, draws random numbers in '{node.name}'"
    return None


def _sources(plan: Plan, owner: str) -> set[str]:
    """Return the owners whose values an owner reads."""
    return {i.source for i in project(plan, [owner]).instructions if isinstance(i, Receive)}
