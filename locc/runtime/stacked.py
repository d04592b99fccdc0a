"""Modules of one structure as one: a wave along its diagonal, with `torch.func.vmap` over stacked parameters.

In a tick, module k trains on batch t - k, for all k at once. Modules whose steps come to the same operations
on tensors of the same shapes run as one, each on its own batch; the others run by themselves, in the same
tick. A module sees its batches in their order, so that a wave ends as one module after the other would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from locc.errors import RunError
from locc.ir import TrainingGraph
from locc.ir.view import node_modules, node_tensors
from locc.lower import Assign, Backward, Loop, ModuleProgram, Receive, Segment, Send, Update
from locc.optimizers import take_step
from locc.runtime.compiled import Piece
from locc.runtime.executor import Executor
from locc.runtime.learner import Learner
from locc.runtime.machine import Machine
from locc.runtime.stops import OF_PYTORCH, account, non_finite
from locc.runtime.waves import Found, Mail, Updated
from locc.snapshot import preserved

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]
Kind = tuple[str, Shapes]
Ran = Callable[[int, int, dict[str, Tensor], Tensor | None], None]


class AloneError(Exception):
    """Says why a module runs by itself."""


class _Pure(Machine):
    """Runs the instructions of a module as a function of its tensors: what it sends, and its objectives."""

    def __init__(self, program: ModuleProgram, values: Mapping[str, Tensor]) -> None:
        super().__init__(program.plan, [None for _ in program.plan.inputs])
        self.values = dict(values)
        self.sent: list[Tensor] = []
        self.objectives: list[Tensor] = []

    def receive(self, task: Any) -> None:
        """Take over what is there already."""

    def send(self, task: Send) -> None:
        """Note what is handed on."""
        self.sent.append(self.values[task.value].detach())

    def backward(self, task: Backward) -> None:
        """Note an objective; all are differentiated together."""
        self.objectives.append(self.values[task.scalar])

    def update(self, task: Update) -> None:
        """Leave that to the optimizers."""


class _Body(nn.Module):
    """A module's step as a module, so that its tensors can be replaced by name."""

    def __init__(self, root: nn.Module, program: ModuleProgram, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.root, self.program = root, program
        self.called = tuple(modules)
        known = {received.name for received in program.receives}
        reads = (n for i in program.plan.instructions if not isinstance(i, Receive) for n in i.reads)
        self.names = list(dict.fromkeys(name for name in reads if name in known))

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        """Return the sum of the objectives, and what is sent beside the objectives."""
        machine = _Pure(self.program, dict(zip(self.names, values, strict=True)))
        before = [dict(vars(module)) | module._buffers for module in self.called]
        machine.run(self.program.plan.instructions)
        for module, was in zip(self.called, before, strict=True):
            now = dict(vars(module)) | module._buffers
            if now.keys() != was.keys() or any(now[name] is not was[name] for name in now):
                raise AloneError(f"its {type(module).__name__} sets an attribute in each step")
        total = torch.stack(machine.objectives).sum()
        return total, (machine.sent, [value.detach() for value in machine.objectives])


@dataclass
class Member:
    """A module that may run with others of its structure.

    Attributes:
        program: its own.
        place: its number in the order in which modules run.
        trained: the parameters that its optimizers move, by their path in `_Body`.
        fixed: the other tensors that it reads.
        learners: its optimizers.
        reached: for each parameter whether its objectives have a gradient of it, known once it is `traced`.
    """

    program: ModuleProgram
    place: int
    trained: dict[str, nn.Parameter]
    fixed: dict[str, Tensor]
    learners: list[Learner]
    body: _Body
    reached: tuple[bool, ...] = ()

    @classmethod
    def of(cls, ir: TrainingGraph, program: ModuleProgram, place: int, executor: Executor) -> Member:
        """Read a module's tensors from the graph.

        Raises:
            AloneError: it has to run by itself.
        """
        nodes = [node for node in ir.graph.nodes if node.meta.get("owner") in program.owners]
        modules = list(dict.fromkeys(m for node in nodes for m in node_modules(ir.root, node)))
        _check(program, modules)
        paths = {id(t): path for path, t in (*ir.root.named_parameters(), *ir.root.named_buffers())}
        held = {id(t): t for node in nodes for _, t in node_tensors(ir.root, node)}
        learners = [executor.learners[o] for o in program.owners if o in executor.learners]
        moved = {id(p): p for learner in learners for p in learner.parameters}
        return cls(
            program,
            place,
            {f"root.{paths[key]}": p for key, p in moved.items()},
            {f"root.{paths[key]}": t for key, t in held.items() if key not in moved},
            learners,
            _Body(ir.root, program, modules),
        )

    @cached_property
    def sends(self) -> list[Send]:
        """What it hands on."""
        return [i for i in self.program.plan.instructions if isinstance(i, Send)]

    @cached_property
    def objectives(self) -> list[str]:
        """Their names."""
        return [
            name for i in self.program.plan.instructions if isinstance(i, Backward) for name in i.objectives
        ]

    def values(self, batch: list[Any], receive: Callable[[Receive], Any]) -> list[Tensor]:
        """Return what its step reads of a batch and of other modules.

        Raises:
            AloneError: something is no tensor.
        """
        found = self.program.plan.bind(batch)
        found |= {i.value: receive(i) for i in self.program.plan.instructions if isinstance(i, Receive)}
        values = [found[name] for name in self.body.names]
        if not all(isinstance(value, Tensor) for value in values):
            raise AloneError("it reads what is no tensor")
        return values

    def step(
        self, trained: Sequence[Tensor], fixed: Sequence[Tensor], values: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        """Return the sum of the objectives and what is sent, for these tensors in place of its own."""
        tensors = dict(zip((*self.trained, *self.fixed), (*trained, *fixed), strict=True))
        found: tuple[Tensor, tuple[list[Tensor], list[Tensor]]] = functional_call(
            self.body, tensors, (values,)
        )
        return found

    def traced(self, values: Sequence[Tensor]) -> Kind:
        """Return what its step does to tensors of which shapes: equal for modules of one structure.

        Raises:
            AloneError: it has to run by itself.
        """
        trained = [tensor.requires_grad_() for tensor in _own(self.trained)]
        copies = [tensor.clone() for tensor in _own(self.fixed)]
        with torch.enable_grad():
            total, _ = self.step(trained, copies, values)
            found = torch.autograd.grad(total, trained, allow_unused=True)
        self.reached = tuple(gradient is not None for gradient in found)
        own = [tensor.detach() for tensor in (*trained, *copies)]
        a, b = len(trained), len(own)
        graph = _graph(lambda *given: self.step(given[:a], given[a:b], given[b:]), *own, *values)
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
            node.replace_all_uses_with(node.all_input_nodes[0])  # the first module's input has no tape anyway
            graph.graph.erase_node(node)
        code = graph.graph.python_code("self").src
        return f"{code}{self.reached}", tuple((t.shape, t.dtype) for t in (*own, *values))


@dataclass
class Stack:
    """Modules of one structure, in their order."""

    members: list[Member]
    functions: dict[Shapes, Callable[..., Any]] = field(default_factory=dict)

    def run(self, batches: Sequence[Sequence[Tensor]], active: list[int]) -> tuple[Any, Any, Any]:
        """Return gradients, what is sent and objectives, each stacked; `batches` of the active members.

        The others take the first one's batch, so that all ticks are of one size; nobody reads what they make.
        """
        given = dict(zip(active, batches, strict=True))
        every = [given.get(i, batches[0]) for i in range(len(self.members))]
        values = [torch.stack(parts) for parts in zip(*every, strict=True)]
        trained = [torch.stack(parts) for parts in zip(*(_own(m.trained) for m in self.members), strict=True)]
        fixed = [torch.stack(parts) for parts in zip(*(_own(m.fixed) for m in self.members), strict=True)]
        shapes = tuple((t.shape, t.dtype) for t in values)
        if shapes not in self.functions:
            self.functions[shapes] = self._traced(trained, [t.clone() for t in fixed], values)
        found: tuple[Any, Any, Any] = self.functions[shapes](*trained, *fixed, *values)
        for i in active:
            for own, tensor in zip(self.members[i].fixed.values(), fixed, strict=True):
                if not isinstance(
                    own, nn.Parameter
                ):  # a buffer: BatchNorm's kernel does not say what it wrote
                    own.copy_(tensor[i])
        return found

    def _traced(
        self, trained: list[Tensor], fixed: list[Tensor], values: list[Tensor]
    ) -> Callable[..., tuple[Any, Any, Any]]:
        """Return the step of all members, without the Python that it is made of."""
        first, a, b = self.members[0], len(trained), len(trained) + len(fixed)

        def one(own: list[Tensor], fixed: list[Tensor], values: list[Tensor]) -> Any:
            # The others are arguments as well, for what is only seen from inside must not change there.
            gradients, (_, (sent, objectives)) = grad_and_value(first.step, has_aux=True)(own, fixed, values)
            return gradients, sent, objectives

        def every(*given: Tensor) -> Any:
            return vmap(one)(list(given[:a]), list(given[a:b]), list(given[b:]))

        return _graph(every, *trained, *fixed, *values)

    @cached_property
    def joint(self) -> torch.optim.Optimizer | None:
        """One optimizer for all of them, with the state that theirs have; None where each steps alone."""
        if any(len(member.learners) != 1 for member in self.members):
            return None
        learners = [member.learners[0] for member in self.members]
        optimizers = [learner.optimizer for learner in learners]
        alike = len({type(o) for o in optimizers}) == 1 and not any(
            len(o.param_groups) > 1 or "step" in vars(o) for o in optimizers
        )
        if not alike or any(learner.draws or learner.clip is not None for learner in learners):
            return None
        joint = object.__new__(type(optimizers[0]))
        vars(joint).update(vars(optimizers[0]))
        joint.state = _States(  # type: ignore[assignment]
            {id(p): o.state for o in optimizers for p in o.param_groups[0]["params"]}
        )
        return joint

    def update(self, active: list[int], accumulate: int) -> None:
        """Step the optimizers of active members."""
        learners = [self.members[i].learners for i in active]
        groups = [own[0].optimizer.param_groups[0] for own in learners]
        alike = all(_settings(group) == _settings(groups[0]) for group in groups[1:])
        if self.joint is None or accumulate > 1 or not alike:
            for one in (one for own in learners for one in own):
                one.update(accumulate)
            return
        self.joint.param_groups = [groups[0] | {"params": [p for g in groups for p in g["params"]]}]
        take_step(self.joint)
        for own in learners:
            own[0].clear()


class _States(dict[Any, Any]):
    """The state of several optimizers, by parameter."""

    def __init__(self, of: dict[int, Any]) -> None:
        super().__init__()
        self._of = of

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of[id(parameter)][parameter]


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
            found[number] = (known | objectives, before if loss is None else loss)

        for tick in range(len(batches) + len(self.programs) - 1):
            ready = {k: tick - k for k in range(len(self.programs)) if 0 <= tick - k < len(batches)}
            for stack in self.stacks:
                active = [i for i, member in enumerate(stack.members) if member.place in ready]
                if len(active) > 1:
                    numbers = [ready.pop(stack.members[i].place) for i in active]
                    self._together(stack, active, [(n, batches[n], mail[n]) for n in numbers], ran)
            for place, number in ready.items():
                part = self.programs[place]
                if place not in self.known:
                    self._look(place, batches[number], mail[number])
                batch, channels = batches[number], mail[number]
                made = self.executor.run(part.plan, batch, step + number, channels, self.moved)
                ran(place, number, *made)
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
            self.stacks = [Stack(members) for members in self.kinds.values() if len(members) > 1]
            for (member,) in (m for m in self.kinds.values() if len(m) == 1):
                self.alone[member.place] = "no other module has its structure"

    def _together(
        self, stack: Stack, active: list[int], each: list[tuple[int, list[Any], Mail]], ran: Ran
    ) -> None:
        """Run the active members of a stack, each on its batch."""
        members = [stack.members[i] for i in active]
        values = [
            member.values(batch, mail.receive) for member, (_, batch, mail) in zip(members, each, strict=True)
        ]
        names = ", ".join(f"'{member.program.name}'" for member in members)
        try:
            gradients, sent, objectives = stack.run(values, active)
        except OF_PYTORCH as error:
            self._clear()
            raise RunError(
                f"the step failed in modules {names}, which run as one: {type(error).__name__}: {error}. "
                + account(self.moved, self.executor.atomic)
            ) from error
        finite = torch.stack([o.isfinite() for o in objectives])[:, active] if objectives else None
        if finite is not None and self.executor.guarded and not bool(finite.all()):
            which, i = (int(n) for n in (~finite).nonzero()[0])
            value = float(objectives[which][active[i]])
            self._clear()
            raise non_finite(members[i].objectives[which], value, account(self.moved, self.executor.atomic))
        apart, out = ([part.unbind() for part in parts] for parts in (gradients, sent))
        for i, member, (_, _, mail) in zip(active, members, each, strict=True):
            for parameter, gradient, reached in zip(
                member.trained.values(), apart, member.reached, strict=True
            ):
                if reached:  # an optimizer leaves alone what has no gradient, but not what has one of zero
                    before = parameter.grad
                    parameter.grad = gradient[i] if before is None else before + gradient[i]
            for instruction, value in zip(member.sends, out, strict=True):
                mail.send(instruction, value[i])
        stack.update(active, self.executor.accumulate)
        self.moved += [learner.owner for member in members for learner in member.learners]
        for i, member, (number, _, _) in zip(active, members, each, strict=True):
            named = dict(zip(member.objectives, (o[i] for o in objectives), strict=True))
            ran(member.place, number, named, None)

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


def _check(program: ModuleProgram, modules: Sequence[nn.Module]) -> None:
    """Refuse what a function of tensors does not show.

    Raises:
        AloneError: says what.
    """
    instructions = program.plan.instructions
    if any(isinstance(i, (Assign, Loop)) or (isinstance(i, Backward) and i.gradients) for i in instructions):
        raise AloneError("its step is more than objectives, their gradients and an update")
    if not any(isinstance(i, Backward) for i in instructions):
        raise AloneError("it does not train")
    if any(isinstance(i, Segment) and program.plan.loss in i.writes for i in instructions):
        raise AloneError("it computes the loss of the network")
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise AloneError(f"a hook runs with its {type(module).__name__}")


def _graph(function: Callable[..., Any], *given: Tensor) -> torch.fx.GraphModule:
    """Return the operations of a function.

    Raises:
        AloneError: it reads a tensor that is none of those given, or draws random numbers, of which each
            module has its own.
    """
    with torch.no_grad():
        graph = make_fx(function)(*given)
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _probability(node) != 0:
            raise AloneError("it draws random numbers")
    if any(node.op == "get_attr" for node in graph.graph.nodes):
        raise AloneError("it reads a tensor that is no parameter, or makes one from numbers")
    return graph


def _probability(node: torch.fx.Node) -> Any:
    """Return the probability with which an operation drops something, None where it has none."""
    for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == "dropout_p":
            return node.args[place] if place < len(node.args) else argument.default_value
    return None


def _own(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (tensor.detach() for tensor in tensors.values())


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
