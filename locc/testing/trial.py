"""Steps of a program that leave no trace, and what its owners hold after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from locc.errors import LoccError
from locc.facts.names import Names, node_buffers
from locc.ir import Inputs
from locc.ir.captured import owned_tensor
from locc.ir.state import begin
from locc.ir.view import node_parameters
from locc.lower import Backward, Instruction, Plan, instructions_of
from locc.program import Program
from locc.proof import Certificate
from locc.proof.experiment.batch import small_batch
from locc.runtime import StepReport, checked
from locc.runtime.untouched import untouched
from locc.snapshot import same_bits

from .local import assert_local

Observer = Callable[[Instruction, dict[str, Any]], None]


def certificate_of(program: Program) -> Certificate:
    """Return the program's certificate; for one that was compiled with verify=False, prove it for now.

    Raises:
        AssertionError: the program is not local, or a check could not be completed.
    """
    checked(program)
    with untouched(program):
        return program.built.certificate or assert_local(program)


def batch_of(program: Program, x: Any, y: Any) -> list[Any]:
    """Return the values of the plan's inputs; without `y`, of a few samples and a made-up target.

    Raises:
        LoccError: the user's loss accepts no target that could be made up.
    """
    checked(program).complete(x)
    if y is not None:
        return program.bind(x, y)
    batch = small_batch(program.ir, Inputs.of(program.model, x))
    if batch.stand_in:
        raise LoccError(f"{batch.text}: give the target y of the batch as well")
    begin(program.root, batch.size)
    values = [*batch.tensors, batch.target]
    device = program.device
    moved: list[Any] = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)
    return moved


def twin(value: Any) -> Any:
    """Return a value with its tensors copied, memory layout included: kernels may round by layout."""
    return tree_map(_copied, value) if not isinstance(value, Tensor) else _copied(value)


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    plain = value.detach()
    if type(plain) is not Tensor or plain.layout is not torch.strided or plain.is_conj() or plain.is_neg():
        return plain.clone()
    storage = plain.untyped_storage().clone()
    return plain.new_empty(0).set_(storage, plain.storage_offset(), plain.shape, plain.stride())


def unit(program: Program, plan: Plan) -> int:
    """Return the number of steps after which every owner has made an update."""
    built = program.built
    waiting = [built.executor.accumulate - built.learners[o].pending for o in plan.trains]
    return max(waiting, default=1)


class Trial:
    """Runs steps as the program's own executor does, from where the program stands now.

    Unless `guarded`, a non-finite objective does not stop a step, so that a poisoned one can be followed.
    """

    def __init__(self, program: Program, guarded: bool = False) -> None:
        own = program.built.executor
        learners = {name: replace(learner) for name, learner in own.learners.items()}
        self.program = program
        self.executor = replace(own, learners=learners, guarded=guarded, observe=None, flags=[])

    def run(
        self, plan: Plan, values: list[Any], number: int, observe: Observer | None = None
    ) -> dict[str, Tensor]:
        """Run the step that comes `number` steps after the program's last one; returns its objectives."""
        return self.report(plan, values, number, observe).objectives

    def report(
        self, plan: Plan, values: list[Any], number: int, observe: Observer | None = None
    ) -> StepReport:
        """Run the same; returns all that a step reports."""
        self.executor.observe = observe
        with self.program.in_phase():
            objectives, loss = self.executor.run(plan, twin(values), self.program.steps + number)
        found = {name: value.clone() for name, value in objectives.items()}
        return StepReport(found, None if loss is None else loss.clone())


State = dict[str, Any]
"""What an owner holds after some steps, by what to call it: "parameter 'a.weight'", "objective 'a.loss'"."""


class Holdings:
    """Which tensors the code of each owner uses.

    Attributes:
        names: parameters and buffers with their paths.
        used: owner -> id -> tensor: everything that its code reads or writes, lent parameters included.
        shared: id -> tensor: what the code of several owners uses.
    """

    def __init__(self, program: Program) -> None:
        ir = program.ir
        self.program = program
        self.names = Names.of(ir)
        self.everything = {**self.names.parameters, **self.names.buffers}
        self.used: dict[str, dict[int, Tensor]] = {name: {} for name in ir.owners}
        for node in ir.graph.nodes:
            held = self.used.get(str(node.meta.get("owner")))
            if held is not None:
                for part in (node, *(n for n in node.all_input_nodes if n.op == "get_attr")):
                    held.update((id(p), p) for _, p in node_parameters(ir.root, part))
                    held.update((id(b), b) for b in node_buffers(ir, part))
        count: dict[int, int] = {}
        for held in self.used.values():
            for i in held:
                count[i] = count.get(i, 0) + 1
        self.shared = {i: t for held in self.used.values() for i, t in held.items() if count[i] > 1}

    def together(self, owners: frozenset[str], tensors: dict[int, Tensor]) -> nn.Module:
        """Return a module that holds the submodules that some owners run, and the given tensors."""
        ir, holder = self.program.ir, nn.Module()
        for node in ir.graph.nodes:
            if node.meta.get("owner") in owners and node.op in ("call_module", "get_attr"):
                held = owned_tensor(ir.root, str(node.target))
                if isinstance(held, nn.Module):
                    holder.add_module(str(id(held)), held)
        for i, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(str(i), tensor)
            else:
                holder.register_buffer(str(i), tensor)
        return holder

    def state(self, owner: str, objectives: list[dict[str, Tensor]]) -> State:
        """Return a copy of all that one owner has learned, and its objectives of each step."""
        found: State = {}
        for kind, items in (("parameter", self.names.parameters), ("buffer", self.names.buffers)):
            for item in items.values():
                if owner in item.owners:
                    found[f"{kind} '{item.path}'"] = twin(item.tensor)
        for item in self.names.parameters.values():
            if owner in item.owners and item.tensor.grad is not None:
                found[f"the gradient of '{item.path}'"] = twin(item.tensor.grad)
        learner = self.program.built.learners.get(owner)
        for parameter, entries in learner.optimizer.state.items() if learner is not None else ():
            known = self.names.parameters.get(id(parameter))
            path = known.path if known is not None else f"a tensor of shape {list(parameter.shape)}"
            for key, value in entries.items():
                found[f"optimizer state '{key}' of '{path}'"] = twin(value)
        own = [str(n.meta["objective"]) for n in self.program.ir.objectives(owner)]
        for step, values in enumerate(objectives):
            for name in own:
                if name in values:
                    found[f"objective '{name}'" + (f" of step {step + 1}" if step else "")] = values[name]
        return found


def difference(one: State, other: State, alike: Callable[[Any, Any], bool] | None = None) -> str | None:
    """Return what is not the same in two states (bit for bit, or `alike`): the first, and how many more."""
    names = dict.fromkeys([*one, *other])
    same = _same if alike is None else alike
    found = [n for n in names if n not in one or n not in other or not same(one[n], other[n])]
    if not found:
        return None
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    return type(one) is type(other) and bool(one == other)


def objectives_of(plan: Plan) -> list[Backward]:
    """Return the backward passes that train their owner."""
    return [i for i in instructions_of(plan.instructions) if isinstance(i, Backward) and i.objectives]


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its text."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"
