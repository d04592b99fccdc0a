"""Modules of one structure as one: a wave along its diagonal, with `torch.func.vmap` over stacked parameters.

In a tick, module k trains on batch t - k, for all k at once. Modules whose steps come to the same operations
on tensors of the same shapes run as one, each on its own batch; the others run by themselves, in the same
tick. A module sees its batches in their order, so that a wave ends as one module after the other would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from locc.errors import RunError
from locc.ir import TrainingGraph
from locc.lower import ModuleProgram
from locc.runtime.compiled import Piece
from locc.runtime.executor import Executor
from locc.runtime.joined import Joined
from locc.runtime.pure import AloneError, Kind, Member, Shapes, operations
from locc.runtime.stops import OF_PYTORCH, account, non_finite
from locc.runtime.waves import Found, Mail, Updated
from locc.snapshot import preserved

Ran = Callable[[int, int, dict[str, Tensor], Tensor | None], None]

aten = torch.ops.aten
_VIEWS = {aten.view, aten._unsafe_view, aten.expand, aten.transpose, aten.permute, aten.detach, aten.alias}
_FILLED = {aten.zeros_like, aten.ones_like, aten.full_like}


@dataclass
class Stack:
    """Modules of one structure, in their order.

    Attributes:
        leader: one that hands on what any of them does.
        held: what they hold, while a wave runs.
    """

    leader: Member
    members: list[Member]
    functions: dict[Shapes, Callable[..., Any]] = field(default_factory=dict)
    held: Joined | None = None

    @classmethod
    def of(cls, members: Sequence[Member]) -> list[Stack]:
        """Share out members whose steps come to the same operations; one of a stack hands on what all do."""
        stacks: list[Stack] = []
        for member in sorted(members, key=lambda member: -len(member.sent)):
            fits = (stack for stack in stacks if set(member.sent) <= set(stack.leader.sent))
            stack = next(fits, None)
            if stack is None:
                stacks.append(cls(member, [member]))
            else:
                stack.members = sorted([*stack.members, member], key=lambda member: member.place)
        return stacks

    @torch.no_grad()
    def run(
        self, held: Joined, batches: Sequence[Sequence[Tensor]], active: range
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what is sent and scalars, each stacked; `batches` of the active members.

        The others take the first one's batch, so that all ticks are of one size; nobody reads what they make.
        """
        idle = len(self.members) - active.stop
        every = [batches[0]] * active.start + [*batches] + [batches[0]] * idle
        values = [torch.stack(parts) for parts in zip(*every, strict=True)]
        shapes = tuple((t.shape, t.dtype) for t in values)
        if shapes not in self.functions:
            self.functions[shapes] = self._traced(held.trained, [t.clone() for t in held.fixed], values)
        before = [stack.clone() for _, stack in held.buffers] if active.start or idle else []
        gradients, sent, scalars = self.functions[shapes](*held.trained, *held.fixed, *values)
        held.take(gradients)
        for (_, stack), was in zip(held.buffers, before, strict=False):
            for part in (slice(0, active.start), slice(active.stop, None)):
                stack[part] = was[part]
        return sent, scalars

    def _traced(
        self, trained: list[Tensor], fixed: list[Tensor], values: list[Tensor]
    ) -> Callable[..., tuple[Any, Any, Any]]:
        """Return the step of all members, without the Python that it is made of."""
        first, a, b = self.leader, len(trained), len(trained) + len(fixed)

        def one(own: list[Tensor], fixed: list[Tensor], values: list[Tensor]) -> Any:
            # The others are arguments as well, for what is only seen from inside must not change there.
            gradients, (_, (sent, scalars)) = grad_and_value(first.step, has_aux=True)(own, fixed, values)
            return gradients, sent, scalars

        def every(*given: Tensor) -> Any:
            return vmap(one)(list(given[:a]), list(given[a:b]), list(given[b:]))

        graph = operations(every, *trained, *fixed, *values)
        buffers = any(not isinstance(tensor, nn.Parameter) for tensor in first.fixed.values())
        return graph if buffers else _tidied(graph)  # BatchNorm's kernel does not say what it writes


@dataclass
class Diagonal:
    """Runs waves of a program. A module runs by itself once, which shows with which others it can run.

    Attributes:
        ir: the program's graph.
        executor: runs what runs by itself.
        programs: of the modules, in order.
        alone: why a module runs by itself, by its number.
        stacks: those that run as one, once all are known.
        moved: the owners that the wave under way has updated.
    """

    ir: TrainingGraph
    executor: Executor
    programs: Sequence[ModuleProgram]
    alone: dict[int, str] = field(default_factory=dict)
    stacks: list[Stack] = field(default_factory=list)
    kinds: dict[Kind, list[Member]] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    moved: list[str] = field(default_factory=list)

    def run(self, batches: Sequence[list[Any]], step: int, updated: Updated) -> list[Found]:
        """Train each module on all batches; see `waves.run`.

        Until it returns, the parameters of modules that run as one are as they were before.

        Raises:
            RunError: see `Executor.run`; earlier modules are ahead of later ones by a batch each.
        """
        homes = {owner: part.name for part in self.programs for owner in part.owners}
        mail = [Mail(homes) for _ in batches]
        found: list[Found] = [({}, None) for _ in batches]
        self.moved = []

        def ran(place: int, number: int, objectives: dict[str, Tensor], loss: Tensor | None) -> None:
            updated(number, self.programs[place].owners, objectives)
            known, before = found[number]
            known.update(objectives)
            found[number] = (known, before if loss is None else loss)

        try:
            for tick in range(len(batches) + len(self.programs) - 1):
                first = max(0, tick - len(batches) + 1)
                ready = {k: tick - k for k in range(first, min(tick + 1, len(self.programs)))}
                for stack in self.stacks:
                    active = [i for i, member in enumerate(stack.members) if member.place in ready]
                    if active:
                        numbers = [ready.pop(stack.members[i].place) for i in active]
                        each = [(n, batches[n], mail[n]) for n in numbers]
                        self._together(stack, range(active[0], active[-1] + 1), each, ran)
                for place, number in ready.items():
                    if place not in self.known:
                        self._look(place, batches[number], mail[number])
                    plan, channels = self.programs[place].plan, mail[number]
                    made = self.executor.run(plan, batches[number], step + number, channels, self.moved)
                    ran(place, number, *made)
        finally:
            for stack in self.stacks:
                if stack.held is not None:
                    stack.held.put_back()
                stack.held = None
        return found

    def _look(self, place: int, batch: list[Any], mail: Mail) -> None:
        """See with which modules one can run, before it runs for the first time."""
        part = self.programs[place]
        self.known.add(place)
        try:
            member = Member.of(self.ir, part, place, self.executor)
            with preserved(self.ir.root, values=False):
                kind = member.traced(member.values(batch, mail.peek))
        except AloneError as error:
            self.alone[place] = str(error)
        except Exception as error:  # what the user's code says of tensors without numbers
            self.alone[place] = f"{type(error).__name__}: {error}"
        else:
            self.kinds.setdefault(kind, []).append(member)
        if len(self.known) == len(self.programs):
            stacks = [stack for members in self.kinds.values() for stack in Stack.of(members)]
            self.stacks = [stack for stack in stacks if len(stack.members) > 1]
            for (member,) in (stack.members for stack in stacks if len(stack.members) == 1):
                self.alone[member.place] = "no other module has its structure"

    def _together(
        self, stack: Stack, active: range, each: list[tuple[int, list[Any], Mail]], ran: Ran
    ) -> None:
        """Run the active members of a stack, each on its batch."""
        members, accumulate = stack.members[active.start : active.stop], self.executor.accumulate
        values = [
            member.values(batch, mail.receive) for member, (_, batch, mail) in zip(members, each, strict=True)
        ]
        if stack.held is None:
            stack.held = Joined.of(stack.members, accumulate)
        held = stack.held
        try:
            sent, scalars = stack.run(held, values, active)
        except OF_PYTORCH as error:
            self._clear()
            names = ", ".join(f"'{member.program.name}'" for member in members)
            raise RunError(
                f"the step failed in {names}, of the modules that run as one: {type(error).__name__}: "
                f"{error}. " + account(self.moved, self.executor.atomic)
            ) from error
        objectives = torch.stack(scalars[: len(stack.leader.objectives)])[:, active.start : active.stop]
        finite = objectives.isfinite()
        if self.executor.guarded and not bool(finite.all()):
            which, i = (int(n) for n in (~finite).nonzero()[0])
            value = float(objectives[which, i])
            self._clear()
            raise non_finite(members[i].objectives[which], value, account(self.moved, self.executor.atomic))
        held.update(active, accumulate)
        if held.optimizer is None:  # the parameters themselves have moved
            held.put_back()
            stack.held = None
        self.moved += [learner.owner for member in members for learner in member.learners]
        out, apart = ([part.unbind() for part in parts] for parts in (sent, scalars))
        for i, member, (number, _, mail) in zip(active, members, each, strict=True):
            for instruction, name in zip(member.sends, member.sent, strict=True):
                mail.send(instruction, out[stack.leader.sent.index(name)][i])
            named = {name: scalar[i] for name, scalar in zip(member.objectives, apart, strict=False)}
            ran(member.place, number, named, None if member.loss is None else apart[member.loss][i])

    def _clear(self) -> None:
        """Drop all gradients, as where a step of any module fails."""
        for learner in self.executor.learners.values():
            learner.clear()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What runs as one, and why the rest does not, by module; of those that have run."""
        return tuple(
            Piece(self.programs[place].name, (), self.alone.get(place)) for place in sorted(self.known)
        )


def _tidied(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Leave out what each call would do in vain: between small tensors it takes as long as all else."""
    nodes = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if any(node.target._schema.is_mutable for node in nodes):
        return graph
    constants: dict[torch.fx.Node, Tensor] = {}
    known: dict[str, torch.fx.Node] = {}
    for node in nodes:
        target: Any = node.target
        packet, inputs = target.overloadpacket, node.all_input_nodes
        same = known.setdefault(f"{target} {node.args} {node.kwargs}", node)
        if same is not node:
            node.replace_all_uses_with(same)
        elif packet in _FILLED or all(source in constants for source in inputs):
            read = {n: constants[n] if n in constants else _empty(_value(n)) for n in inputs}
            args, named = torch.fx.map_arg((node.args, node.kwargs), read.__getitem__)
            constants[node] = target(*args, **named)
        elif packet in _VIEWS or (target is aten.mul.Scalar and node.args[1] == 1):
            node.replace_all_uses_with(
                next((one for one in _sources(inputs[0]) if _alike(_value(one), _value(node))), node)
            )
    for number, (node, value) in enumerate(constants.items()):
        graph.register_buffer(f"constant{number}", value, persistent=False)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"constant{number}"))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _sources(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield a node, and what it is a view of."""
    yield node
    while isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in _VIEWS:
        node = node.all_input_nodes[0]
        yield node


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def _empty(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _value(node: torch.fx.Node) -> Tensor:
    """Return a tensor without numbers like that which a node has made."""
    found: Tensor = node.meta["val"]
    return found
