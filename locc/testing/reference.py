"""What a training graph means, as an interpreter that knows nothing of plans.

Every node computes its value from the parameters and state as they were before the step (inside a
repeated region: before its round), a `gradient` is the derivative of its scalar, and all updates and
assigns commit together at the end. A node that draws has a random stream of its own. A step computes what
its objectives and assigns need, in a phase those of the owners that train, and tapes what is differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from locc.errors import RunError
from locc.ir import ops
from locc.ir.calls import given
from locc.ir.captured import owned_tensor
from locc.ir.tape import changers
from locc.ir.view import draws, stream_of
from locc.runtime import Compiled, StepReport
from locc.runtime.streams import autocast, of_backward, of_update, preserved_rng, seed_all, stream


def reference_step(program: Compiled, x: Any, y: Any = None) -> StepReport:
    """Train on one batch as `program.step` does, by the definition of the graph alone.

    Every plan, schedule and backend is compared with it. Parameters, state and optimizers move.

    Raises:
        RunError: an objective is not finite; nothing has changed but what the model's own code changes.
    """
    program.complete(x)
    return reference_values(program, program.bind(x, y))


def reference_values(program: Compiled, values: list[Any]) -> StepReport:
    """Train on a batch as `program.bind` returns it; see `reference_step`."""
    meaning = _Meaning(program, dict(zip((*program.ir.inputs, program.ir.target), values, strict=True)))
    with program.in_phase(), preserved_rng(program.device):
        report = meaning.step()
    program.steps += 1
    return report


class _Meaning:
    def __init__(self, program: Compiled, batch: dict[fx.Node, Any]) -> None:
        self.program, self.ir, self.context = program, program.ir, program.built.executor
        self.values, self.round = batch, 0
        trains = {o for p in program.phases if p.name == program.phase for o in p.trains}
        self.trains = trains or set(self.ir.owners)
        self.changes = changers(self.ir.graph)
        self.needed = self._needed()
        self.wrt = {n.args[1] for n in self.needed if n.target is ops.gradient}
        derived = [n.all_input_nodes[0] for n in self.needed if n.target in (ops.gradient, ops.objective)]
        self.taped = self._behind(derived, (ops.stop_gradient, ops.gradient))
        self.objectives: dict[str, Tensor] = {}
        self.commits: list[tuple[Tensor, Tensor]] = []

    def _needed(self) -> set[fx.Node]:
        mine = [n for n in self.ir.graph.nodes if n.meta.get("owner") in self.trains]
        needed = self._behind([n for n in mine if n.target in (ops.objective, ops.assign)])
        needed |= self._behind([c for n in mine if n.op == "get_attr" for c in self.changes.get(n, ())])
        delays = [n for n in self.ir.graph.nodes if self.ir.keeps(n)]
        while late := [n for n in delays if n.args[0] in needed and n not in needed]:
            needed |= self._behind(late)  # what a delay holds is a value of every step
        loss = self.ir.loss
        if loss and (loss.meta["owner"] in self.trains or needed.issuperset(loss.all_input_nodes)):
            needed |= self._behind([loss])
        return needed

    def _behind(self, roots: list[fx.Node], ends: tuple[Any, ...] = ()) -> set[fx.Node]:
        seen: set[fx.Node] = set()
        while roots:
            node = roots.pop()
            if node not in seen:
                seen.add(node)
                if node.target not in ends:
                    roots += [*node.all_input_nodes, *self.changes.get(node, ())]
        return seen

    def step(self) -> StepReport:
        ends = {n.meta.get("repeat", n): n for n in self.ir.graph.nodes if n in self.needed}
        for node in sorted(ends.values()):  # a region where its last node is: all that it reads is there
            self._value(node)
        for name, value in self.objectives.items():
            if not torch.isfinite(value):
                raise RunError(f"objective '{name}' is {float(value)}; nothing was updated")
        trained = {n.meta["owner"] for n in self.needed if n.target is ops.objective}
        for owner in (o for o in self.context.learners if o in trained):
            self._draw(of_update(owner))
            self.context.learners[owner].update(self.context.accumulate)
        self._commit()
        loss = self.values.get(self.ir.loss) if self.ir.loss is not None else None
        return StepReport(self.objectives, None if loss is None else loss.detach())

    def _commit(self) -> None:
        with torch.no_grad():
            for tensor, value in self.commits:
                tensor.copy_(value)
        self.commits = []

    def _value(self, node: fx.Node) -> None:
        if node not in self.values and "repeat" in node.meta:
            self._repeat(node.meta["repeat"])
        elif node not in self.values:
            for source in node.all_input_nodes:
                self._value(source)
            self.values[node] = self._compute(node)

    def _repeat(self, name: str) -> None:
        region, before, self.commits = self.ir.repeats[name], self.commits, []
        nodes = [n for n in self.ir.graph.nodes if n in self.needed and n.meta.get("repeat") == name]
        for source in (s for n in nodes for s in n.all_input_nodes if s not in nodes):
            self._value(source)
        pairs = [(entry, end) for entry, end in region.carried if entry in nodes]
        carried = {entry: ops.carry(self.values[entry.all_input_nodes[0]]) for entry, _ in pairs}
        for self.round in range(region.times):
            self.values.update(carried)
            for node in (n for n in nodes if n not in carried):
                self.values[node] = self._compute(node)
            carried = {entry: ops.carry(self.values[end]) for entry, end in pairs}
            self._commit()
        self.round, self.commits = 0, before

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = (given(part, self.values.__getitem__) for part in (node.args, node.kwargs))
        if node.op == "get_attr":
            return owned_tensor(self.ir.root, str(node.target))
        if node.target is ops.assign:
            return self.commits.append((args[0], args[1].detach().clone()))
        if node.target in (ops.gradient, ops.objective):
            self._draw(of_backward(node.all_input_nodes[0].name))
        if node.target is ops.objective:
            self.objectives[str(node.meta["objective"])] = args[0].detach()
            return args[0].backward(retain_graph=True) if args[0].requires_grad else None
        if draws(self.ir.root, node):
            self._draw(stream_of(node))
        target: Any = node.target
        if node.op == "call_module":
            target = self.ir.root.get_submodule(target)
        elif node.op == "call_method":
            target, args = getattr(args[0], target), args[1:]
        with torch.set_grad_enabled(node in self.taped), autocast(self.program.device, self.context.autocast):
            value = target(*args, **kwargs)
        return value.detach().requires_grad_() if node in self.wrt and not value.requires_grad else value

    def _draw(self, name: str) -> None:
        seed_all(stream(self.context.seed, self.program.steps, name, self.round))
