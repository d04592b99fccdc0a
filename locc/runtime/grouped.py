"""Neighbours as one: the steps of some modules, one after the other, as one function that is compiled whole.

Each module's step, its gradients included, is a function of tensors (`pure`). In a group what one hands on
is read by the next inside of that function, and the optimizers step when it has returned. So all gradients
of a group are in memory together, and a budget says how much that may be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils._pytree import tree_leaves

from locc.errors import RunError
from locc.ir import TrainingGraph
from locc.ir.memory import memory_of
from locc.lower import ModuleProgram, Receive, Send
from locc.runtime.compiled import in_a_line
from locc.runtime.executor import Executor
from locc.runtime.joined import joint_of, step_together
from locc.runtime.learner import Learner
from locc.runtime.pure import AloneError, Member, Shapes, detached, hooked, operations
from locc.runtime.stops import account, non_finite
from locc.runtime.waves import Found, Mail
from locc.snapshot import preserved

_log = logging.getLogger("locc")

Function = Callable[..., tuple[Tensor, ...]]
"""Of what a group reads and holds: its gradients, its scalars, and what it hands on."""


@dataclass
class Group:
    """Neighbours, in order; `functions` has their step for each size of a batch, None where it cannot be."""

    members: list[Member]
    functions: dict[Shapes, Function | None] = field(default_factory=dict)

    @cached_property
    def sources(self) -> dict[str | int, Receive | int]:
        """Where they have from what they read and none of them makes."""
        made = {send.value for member in self.members for send in member.sends}
        found = {_key(source): source for member in self.members for source in member.sources}
        return {key: source for key, source in found.items() if key not in made}

    @cached_property
    def sends(self) -> list[Send]:
        """What they hand on to others."""
        inside = {owner for member in self.members for owner in member.program.owners}
        found = (
            replace(s, to=tuple(o for o in s.to if o not in inside)) for m in self.members for s in m.sends
        )
        return [send for send in found if send.to]

    def tensors(self) -> list[Tensor]:
        """Return what they hold."""
        return [t for m in self.members for t in (*detached(m.trained), *detached(m.fixed))]

    def traced(self, values: Sequence[Tensor]) -> torch.fx.GraphModule:
        """Return the operations of a `Function`.

        Raises:
            AloneError: see `operations`.
        """

        def every(*given: Tensor) -> tuple[Tensor, ...]:
            rest = iter(given)
            known = {key: next(rest) for key in self.sources}
            gradients: list[Tensor] = []
            scalars: list[Tensor] = []
            for member in self.members:
                own, fixed = ([next(rest) for _ in held] for held in (member.trained, member.fixed))
                read = [known[_key(source)] for source in member.sources]
                found, (_, (sent, yields)) = grad_and_value(member.step, has_aux=True)(own, fixed, read)
                known |= zip((send.value for send in member.sends), sent, strict=True)
                gradients += [gradient.contiguous() for gradient in found]  # as fused optimizers need them
                scalars += yields
            return *gradients, *scalars, *(known[send.value] for send in self.sends)

        return operations(every, *values, *self.tensors())


@dataclass
class Groups:
    """Runs steps of a program, neighbours as one. In the first step each module runs by itself, eagerly.

    Attributes:
        ir: the program's graph.
        executor: runs what runs by itself.
        programs: of the modules, in order.
        budget: the most that a group may allocate in a step, in bytes, if nothing went before its end.
        strict: whether it is an error that a module runs by itself.
        units: once they are known, the modules in order: groups, and those that run by themselves.
        alone: why one runs by itself, by its name.
        known: the sizes of batches that have run.
    """

    ir: TrainingGraph
    executor: Executor
    programs: Sequence[ModuleProgram]
    budget: int
    strict: bool
    units: list[Group | ModuleProgram] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)
    known: set[tuple[str, ...]] = field(default_factory=set)

    def run(self, batch: list[Any], step: int) -> Found:
        """Train on a batch; see `Executor.run`.

        Raises:
            RunError: see `Executor.run`; or with `strict`, a module has to run by itself.
        """
        mail = Mail({owner: part.name for part in self.programs for owner in part.owners})
        moved: list[str] = []
        made: list[Found] = []
        eagerly = replace(self.executor, backend="eager")
        if not self.units:
            looked = []
            for part in self.programs:
                looked.append(self._look(part, batch, mail))
                made.append(eagerly.run(part.plan, batch, step, mail, moved))
            self._share_out(looked)
        else:
            self.executor.raise_deferred(step)
            for unit in self.units:
                refused: Exception | None = None
                try:
                    found = self._together(unit, batch, mail, moved) if isinstance(unit, Group) else None
                except RunError:
                    raise
                except Exception as error:  # the compiler's, or the batch's own: nothing has changed
                    found, refused = None, error
                parts = [m.program for m in unit.members] if isinstance(unit, Group) else [unit]
                runs = self.executor if refused is None else eagerly  # which tells what is wrong with a batch
                made += found or [runs.run(p.plan, batch, step, mail, moved) for p in parts]
                if refused is not None and isinstance(unit, Group):
                    self._refuse(unit, batch, refused)
        self.known.add(_sizes(batch))
        objectives = {name: value for found, _ in made for name, value in found.items()}
        return objectives, next((loss for _, loss in made if loss is not None), None)

    def _look(self, part: ModuleProgram, batch: list[Any], mail: Mail) -> tuple[Member, int] | ModuleProgram:
        """Return a module with what its step allocates, or its program where it has to run by itself."""
        try:
            member = Member.of(self.ir, part, 0, self.executor)
            values = member.values(batch, mail.peek)
            with preserved(self.ir.root, values=False):
                member.traced(values)
                copies = [tensor.clone() for tensor in detached(member.fixed)]
                with torch.no_grad():
                    member.step(list(detached(member.trained)), copies, values)
                if not all(map(torch.equal, copies, detached(member.fixed))):
                    raise AloneError("it writes a buffer, as BatchNorm does")
                if any(learner.draws for learner in member.learners):
                    raise AloneError(
                        "its optimizer may draw random numbers: it has hooks, or is not PyTorch's own"
                    )
                return member, _allocated(Group([member]).traced(values))
        except AloneError as error:
            self.alone[part.name] = str(error)
        except Exception as error:  # what the user's code says of tensors without numbers
            self.alone[part.name] = f"{type(error).__name__}: {error}"
        return part

    def _share_out(self, looked: Sequence[tuple[Member, int] | ModuleProgram]) -> None:
        """Make the longest runs of neighbours that keep to the budget.

        Raises:
            RunError: see `run`.
        """
        runs: list[list[Member]] = []
        left = 0
        for one in looked:
            if isinstance(one, ModuleProgram):
                self.units.append(one)
                left = 0
                continue
            member, size = one
            if size > left:
                runs.append([])
                self.units.append(Group(runs[-1]))
                left = self.budget
            runs[-1].append(member)
            left -= size
        units = list(self.units)
        for place, unit in enumerate(units):
            if isinstance(unit, Group) and len(unit.members) == 1:
                part = self.units[place] = unit.members[0].program
                beside = units[max(0, place - 1) : place + 2]
                self.alone[part.name] = "no module beside it can join"
                if sum(isinstance(one, Group) for one in beside) > 1:
                    self.alone[part.name] = (
                        f"a group with a neighbour allocates more than group={self.budget}"
                    )
        if self.strict and self.alone:
            name, why = next(iter(self.alone.items()))
            raise RunError(
                f"module '{name}' is in no group, for {why}; leave out strict=True, and it runs by itself"
            )

    def _together(self, group: Group, batch: list[Any], mail: Mail, moved: list[str]) -> list[Found] | None:
        """Run a group as one, and return what `Executor.run` does of each module; None where it cannot be."""
        executor = self.executor
        watched = executor.observe is not None or torch._C._len_torch_dispatch_stack() > 0
        cast = torch.is_autocast_enabled(executor.device.type)
        if watched or cast or any(hooked(module) for m in group.members for module in m.body.called):
            return None
        sources = group.sources.values()
        values = [batch[s] if isinstance(s, int) else mail.peek(s) for s in sources]
        shapes = _shapes(batch)
        if shapes not in group.functions:
            group.functions[shapes] = self._compiled(group, values)
        function = group.functions[shapes]
        if function is None:
            return None
        tensors = group.tensors()
        with torch.no_grad():
            made = iter(function(*values, *tensors))
        for source in sources:
            if not isinstance(source, int):
                mail.receive(source)
        gradients = [next(made) for member in group.members for _ in member.trained]
        scalars = [next(made) for member in group.members for _ in range(member.scalars)]
        held = {memory_of(tensor) for tensor in tensors} if group.sends else ()
        for send, value in zip(group.sends, made, strict=True):
            mail.send(send, value.clone() if memory_of(value) in held else value)
        return self._finish(group, gradients, scalars, moved)

    def _finish(
        self, group: Group, gradients: list[Tensor], scalars: list[Tensor], moved: list[str]
    ) -> list[Found]:
        """Update the modules of a group, up to the one with an objective that is not finite, if there is one.

        Raises:
            RunError: there is.
        """
        rest = iter(gradients)
        guarded = self.executor.guarded  # else nobody waits for the numbers
        fine = torch.stack(scalars).isfinite().tolist() if guarded else [True] * len(scalars)
        every = iter(zip(scalars, fine, strict=True))
        found: list[Found] = []
        learners: list[Learner] = []
        failed: tuple[str, Tensor] | None = None
        for member in group.members:
            own = [next(every) for _ in range(member.scalars)]
            named = {name: value for name, (value, _) in zip(member.objectives, own, strict=False)}
            failed = next((one for one, (_, ok) in zip(named.items(), own, strict=False) if not ok), None)
            if failed is not None:
                break
            for parameter, gradient in zip(member.trained.values(), rest, strict=False):
                before = parameter.grad
                parameter.grad = gradient if before is None else before + gradient
            found.append((named, None if member.loss is None else own[member.loss][0]))
            learners += member.learners
        self._update(learners)
        moved += [learner.owner for learner in learners]
        if failed is not None:
            for learner in self.executor.learners.values():
                learner.clear()
            raise non_finite(failed[0], float(failed[1]), account(moved, self.executor.atomic))
        return found

    def _update(self, learners: Sequence[Learner]) -> None:
        joint = joint_of(learners) if self.executor.accumulate == 1 and learners else None
        if joint is None:
            for learner in learners:
                learner.update(self.executor.accumulate)
            return
        joint.state = _States(learners)  # type: ignore[assignment]
        step_together(joint, learners, [list[Tensor](one.parameters) for one in learners])
        for learner in learners:
            learner.clear()

    def _refuse(self, group: Group, batch: list[Any], error: Exception) -> None:
        """Note why a group does not run as one, though its modules do one by one.

        Raises:
            RunError: `strict` is asked for.
        """
        names = ", ".join(f"'{member.program.name}'" for member in group.members)
        why = str(error) if isinstance(error, AloneError) else in_a_line(error)
        if self.strict:
            raise RunError(f"modules {names} cannot run as one: {why}; leave out strict=True") from error
        _log.warning("locc: modules %s run one by one: %s", names, why)
        group.functions[_shapes(batch)] = None
        self.alone |= {member.program.name: why for member in group.members}

    def _compiled(self, group: Group, values: Sequence[Tensor]) -> Function:
        graph = group.traced(values)
        needs = _allocated(graph)
        if needs > self.budget:
            raise AloneError(f"for batches of this size they allocate {needs} bytes, more than {self.budget}")
        if self.executor.backend == "aot_eager":
            return graph
        import torch._inductor

        made: Function = torch._inductor.compile(graph, [*values, *group.tensors()])
        return made

    def unknown(self, batches: Sequence[Any]) -> bool:
        """Whether one is of a size that has not run yet."""
        return any(_sizes(batch) not in self.known for batch in batches)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The names of those that run as one."""
        every = (unit.members for unit in self.units if isinstance(unit, Group))
        return tuple(tuple(member.program.name for member in members) for members in every)


class _States(dict[Any, Any]):
    """The state of several optimizers, by parameter."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        super().__init__()
        self._of: dict[Any, Any] = {p: one.optimizer for one in learners for p in one.parameters}

    def __missing__(self, parameter: Tensor) -> Any:
        return self._of[parameter].state[parameter]


def _shapes(batch: list[Any]) -> Shapes:
    return tuple((value.shape, value.dtype) for value in tree_leaves(batch) if isinstance(value, Tensor))


def _sizes(batch: Any) -> tuple[str, ...]:
    """Return what is equal for batches of one size, bound to the model's arguments or not."""
    return tuple(sorted(str(tuple(value.shape)) for value in tree_leaves(batch) if isinstance(value, Tensor)))


def _key(source: Receive | int) -> str | int:
    return source if isinstance(source, int) else source.value


def _allocated(graph: torch.fx.GraphModule) -> int:
    """Return the bytes of all that a graph makes, views of what is there already not counted."""
    made = 0
    for node in graph.graph.nodes:
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
        if returns and all(one.alias_info is None for one in returns):
            made += sum(t.nbytes for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor))
    return made
