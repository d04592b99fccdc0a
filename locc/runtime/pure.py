"""A module's step as a function of its tensors, and why that of some modules is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from locc.ir import TrainingGraph
from locc.ir.view import node_modules, node_tensors
from locc.lower import Assign, Backward, Loop, ModuleProgram, Receive, Segment, Send, Update
from locc.runtime.executor import Executor
from locc.runtime.learner import Learner
from locc.runtime.machine import Machine

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]
Kind = tuple[str, Shapes]


class AloneError(Exception):
    """Says why a module runs by itself."""


class _Pure(Machine):
    """Runs the instructions of a module as a function of its tensors: what it sends, and its objectives."""

    def __init__(self, program: ModuleProgram, values: Mapping[str, Tensor]) -> None:
        super().__init__(program.plan, [None for _ in program.plan.inputs])
        self.values = dict(values)
        self.sent: list[Tensor] = []
        self.objectives: list[Tensor] = []
        self.loss: list[Tensor] = []

    def receive(self, task: Any) -> None:
        """Take over what is there already."""

    def send(self, task: Send) -> None:
        """Note what is handed on."""
        self.sent.append(self.values[task.value].detach())

    def segment(self, segment: Segment) -> None:
        """Note the loss of the network, where it is no objective."""
        super().segment(segment)
        tasks = [i for i in self.plan.instructions if isinstance(i, Backward)]
        if self.plan.loss in segment.writes and all(task.scalar != self.plan.loss for task in tasks):
            self.loss = [self.values[self.plan.loss]]

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
        """Return the sum of the objectives, and what is sent beside the objectives and the network's loss."""
        machine = _Pure(self.program, dict(zip(self.names, values, strict=True)))
        before = [dict(vars(module)) | module._buffers for module in self.called]
        machine.run(self.program.plan.instructions)
        for module, was in zip(self.called, before, strict=True):
            now = dict(vars(module)) | module._buffers
            if now.keys() != was.keys() or any(now[name] is not was[name] for name in now):
                raise AloneError(f"its {type(module).__name__} sets an attribute in each step")
        total = sum(machine.objectives[1:], machine.objectives[0])
        return total, (machine.sent, [value.detach() for value in (*machine.objectives, *machine.loss)])


@dataclass
class Member:
    """A module that may run with others of its structure.

    Attributes:
        program: its own.
        place: its number in the order in which modules run.
        trained: the parameters that its optimizers move, by their path in `_Body`; once it is `traced`, those
            of them that its objectives have a gradient of.
        fixed: the other tensors that it reads.
        learners: its optimizers.
        sent: what it hands on, by its name in the trace, known once it is `traced`.
    """

    program: ModuleProgram
    place: int
    trained: dict[str, nn.Parameter]
    fixed: dict[str, Tensor]
    learners: list[Learner]
    body: _Body
    sent: tuple[str, ...] = ()

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
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in moved.values()):
            raise AloneError("a hook runs with the gradient of a parameter")
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
        return [name for task in self._tasks for name in task.objectives]

    @cached_property
    def loss(self) -> int | None:
        """Which of its scalars is the loss of the network, if it makes that."""
        found = (n for n, task in enumerate(self._tasks) if task.scalar == self.program.plan.loss)
        return next(found, None if self.program.plan.loss is None else len(self._tasks))

    @cached_property
    def scalars(self) -> int:
        """How many its step yields: its objectives and, where it is none of these, the network's loss."""
        return max(len(self._tasks), 0 if self.loss is None else self.loss + 1)

    @cached_property
    def _tasks(self) -> list[Backward]:
        return [i for i in self.program.plan.instructions if isinstance(i, Backward)]

    @cached_property
    def sources(self) -> list[Receive | int]:
        """Where it has from what it reads: of other modules, or the batch by its place there."""
        plan = self.program.plan
        received = {i.value: i for i in plan.instructions if isinstance(i, Receive)}
        return [received[n] if n in received else plan.inputs.index(n) for n in self.body.names]

    def values(self, batch: list[Any], receive: Callable[[Receive], Any]) -> list[Tensor]:
        """Return what its step reads of a batch and of other modules.

        Raises:
            AloneError: something is no tensor.
        """
        values = [batch[s] if isinstance(s, int) else receive(s) for s in self.sources]
        if not all(isinstance(value, Tensor) for value in values):
            raise AloneError("it reads what is no tensor")
        return values

    def step(
        self, trained: Sequence[Tensor], fixed: Sequence[Tensor], values: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        """Return the sum of the objectives, what is sent and scalars, for these tensors in place of its."""
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
        trained = [tensor.requires_grad_() for tensor in detached(self.trained)]
        copies = [tensor.clone() for tensor in detached(self.fixed)]
        with torch.enable_grad():
            total, _ = self.step(trained, copies, values)
            found = torch.autograd.grad(total, trained, allow_unused=True)
        # An optimizer leaves alone what has no gradient, but not what has one of zero.
        reached = [name for name, gradient in zip(self.trained, found, strict=True) if gradient is not None]
        self.fixed |= {name: p for name, p in self.trained.items() if name not in reached}
        self.trained = {name: self.trained[name] for name in reached}
        given = [*detached(self.trained), *(tensor.clone() for tensor in detached(self.fixed))]
        a, b = len(self.trained), len(given)
        graph = operations(lambda *given: self.step(given[:a], given[a:b], given[b:]), *given, *values).graph
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
            node.replace_all_uses_with(node.all_input_nodes[0])  # the first module's input has no tape anyway
            graph.erase_node(node)
        output = graph.output_node()
        made: Any = output.args[0]
        self.sent = tuple(node.name for node in made[1][0])
        output.args = ((made[0], made[1][1]),)
        code = graph.python_code("self").src
        return f"{code}{a}", tuple((t.shape, t.dtype) for t in (*given, *values))


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
    for module in modules:
        if hooked(module):
            raise AloneError(f"a hook runs with its {type(module).__name__}")


def hooked(module: nn.Module) -> bool:
    """Whether somebody's code runs with a module's own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def operations(function: Callable[..., Any], *given: Tensor) -> torch.fx.GraphModule:
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


def detached(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield tensors without their tape."""
    return (tensor.detach() for tensor in tensors.values())
