"""What a method has to keep to on every model that it admits: one function a check.

A check takes a `Subject`, trains programs of its own, and raises AssertionError with what is wrong and what
to do. `CONFORMANCE` lists them in the order in which they run; a new one is a function and a line there.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from locc.errors import LoccError
from locc.ir import Inputs, assign, node_parameters
from locc.lower import Backward, Instruction
from locc.rewrite import GradientChain, Method, OutputLoss, Pass
from locc.runtime import Program

from .case import Case
from .isolation import assert_isolated
from .local import assert_local
from .pipeline import assert_pipeline_exact
from .translation import assert_lowered, assert_side_by_side
from .trial import Trial, difference, first_line


@dataclass(frozen=True)
class Subject:
    """A method on a model: what a check makes its programs of."""

    name: str
    case: Case

    @property
    def method(self) -> Method:
        """The method, configured."""
        assert isinstance(self.case.method, Method)
        return self.case.method

    def program(self, *, verify: bool = False, **overrides: Any) -> Program:
        """Return a new program on a new model; unproved, since a check is there for that."""
        return self.case.compile(verify=verify, **overrides)

    @cached_property
    def double(self) -> tuple[Program, Case]:
        """The case in float64 and its program, shared by the checks that leave a program as it was."""
        case = replace(self.case, model=replace(self.case.model, dtype=torch.float64))
        return case.compile(verify=False), case

    def with_method(self, method: Method) -> Subject:
        """Return the same model under another method."""
        return replace(self, case=replace(self.case, method=method))

    def whole(self) -> Subject:
        """Return the same method on the uncut model."""
        return replace(self, case=replace(self.case, splits=()))

    def train(self, program: Program, rounds: int = 1, start: int = 0) -> None:
        """Run a step in every phase, in the order in which `fit` would reach them, `rounds` times."""
        for number in range(start, start + rounds):
            for phase in phases_of(program):
                program.phase = phase
                program.step(*self.case.batch(number))


def phases_of(program: Program) -> list[str | None]:
    """Return the names of a program's phases; [None] where all owners train in every step."""
    return [phase.name for phase in program.phases] or [None]


def _demand(held: bool, otherwise: str) -> None:
    """Raise AssertionError, also under `python -O`, and as one sentence in pytest."""
    if not held:
        raise AssertionError(otherwise)


@dataclass(frozen=True)
class _Backpropagation(Method):
    """What a proxy method is on an uncut model."""

    family: ClassVar[str] = "baseline"
    reference: ClassVar[str] = "Rumelhart, Hinton & Williams 1986"

    def passes(self) -> Sequence[Pass]:
        return (OutputLoss(), GradientChain())


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


_ALONE = "give a module that sends nothing the user's loss alone (OutputLoss)"


def one_module_is_backpropagation(subject: Subject) -> None:
    """A method of the family "proxy" on an uncut model trains it as backpropagation does, bit for bit."""
    if subject.method.family != "proxy":
        return
    whole = subject.whole()
    own, plain = whole.program(), whole.with_method(_Backpropagation()).program()
    for number in range(3):
        batch = subject.case.batch(number)
        _demand(
            torch.equal(own.step(*batch).loss, plain.step(*batch).loss),
            f"on the uncut model, the loss of step {number + 1} is not that of backpropagation; {_ALONE}",
        )
    different = difference(_state(plain.model), _state(own.model))
    _demand(
        different is None,
        f"on the uncut model, {different} is not what backpropagation makes of it; {_ALONE}",
    )


def _trainable(program: Program) -> dict[str, nn.Parameter]:
    return {name: p for name, p in program.root.named_parameters() if p.requires_grad}


def every_parameter_has_one_optimizer(subject: Subject) -> None:
    """No parameter is in two optimizers, and an optimizer holds only what some node of the graph reads."""
    program = subject.program()
    names = {id(p): name for name, p in program.root.named_parameters()}
    used = {id(p) for node in program.ir.graph.nodes for _, p in node_parameters(program.ir.root, node)}
    holder: dict[int, str] = {}
    for owner, optimizer in program.optimizers.items():
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = names.get(id(parameter), f"a tensor of shape {list(parameter.shape)}")
            other = holder.setdefault(id(parameter), owner)
            _demand(other == owner, f"the optimizers of '{other}' and '{owner}' both hold {name}")
            _demand(id(parameter) in used, f"the optimizer of '{owner}' holds {name}, which no node reads")


def every_parameter_moves(subject: Subject) -> None:
    """Some steps change every parameter that trains, those of auxiliaries included.

    Excused is what backpropagation leaves where it is as well: a bias that a normalisation takes out again.
    """
    stuck = _still(subject)
    excused = _still(subject.with_method(_Backpropagation()), 1e-6) if stuck else set()
    _demand(
        stuck <= excused,
        f"3 steps change nothing in {sorted(stuck - excused)}; give each module and auxiliary an objective "
        "that moves its parameters, and let `requires` refuse modules for which there is none",
    )


def _still(subject: Subject, least: float = 0.0) -> set[str]:
    """Return the parameters that train and that three steps change by no more than `least`."""
    program = subject.program()
    before = {name: p.detach().clone() for name, p in _trainable(program).items()}
    subject.train(program, rounds=3)
    return {n for n, p in _trainable(program).items() if bool((p.detach() - before[n]).abs().max() <= least)}


def inference_is_the_model(subject: Subject) -> None:
    """After training, inference is the user's model by itself, bit for bit; without hooks.

    Of a method that declares a fold (`ir.folded`), the results have the shapes of the model's.
    """
    program = subject.program()
    subject.train(program)
    program.eval()
    inputs = Inputs.of(program.model, subject.case.batch()[0])
    found = tree_leaves(program(*inputs.args, **inputs.kwargs))
    bare = copy.deepcopy(program.model)
    wanted = tree_leaves(bare(*inputs.args, **inputs.kwargs))
    _demand(
        [_shape(v) for v in found] == [_shape(v) for v in wanted],
        "inference returns other shapes than the model; leave ir.inference as it is",
    )
    if program.ir.folded:
        return
    hooked = [
        n or "the model" for n, m in program.model.named_modules() if m._forward_hooks or m._forward_pre_hooks
    ]
    _demand(not hooked, f"training leaves hooks on {hooked} of the user's model; remove them")
    same = all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True) if isinstance(a, Tensor))
    _demand(same, "inference gives other values than the model by itself; leave ir.inference as it is")


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else type(value)


def inference_reads_no_label(subject: Subject) -> None:
    """Inference takes the model's inputs alone, and evaluating against other labels leaves it as it was."""
    program = subject.program()
    subject.train(program)
    program.eval()
    taken = [n.name for n in program.ir.inference.nodes if n.op == "placeholder"]
    inputs = [n.name for n in program.ir.inputs]
    _demand(len(taken) == len(inputs), f"inference takes {taken}, and the model's inputs are {inputs}")
    before = _state(program.root)
    for number in range(2):
        program.evaluate([(subject.case.batch()[0], subject.case.batch(number)[1])])
    different = difference(before, _state(program.root))
    _demand(different is None, f"evaluating changes {different}; only a training step may")


def _written(program: Program) -> set[str]:
    targets = [n.args[0] for n in program.ir.graph.nodes if n.target is assign]
    return {str(t.target) for t in targets if isinstance(t, fx.Node)}


def fixed_matrices_stay(subject: Subject) -> None:
    """Buffers of auxiliaries that nothing assigns are constant, are in no optimizer, and are saved."""
    program = subject.program()
    norms = [n for n, m in program.root.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = {
        f"{path}.{n}" for path in norms for n, _ in program.root.get_submodule(path).named_buffers()
    }
    left = statistics | _written(program)
    buffers = {f"aux.{n}": b for n, b in program.root.aux.named_buffers() if f"aux.{n}" not in left}
    fixed = {name: buffer.clone() for name, buffer in buffers.items()}
    subject.train(program, rounds=3)
    now = dict(program.root.named_buffers())
    moved = [n for n in fixed if not torch.equal(fixed[n], now[n])]
    _demand(not moved, f"training changes {moved}; write to a buffer with ir.assign, or leave it constant")
    held = {id(p) for o in program.optimizers.values() for g in o.param_groups for p in g["params"]}
    _demand(not [n for n in fixed if id(now[n]) in held], "an optimizer holds a buffer")
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder) / "state")
        with torch.no_grad():
            for name in fixed:
                now[name].add_(1)
        program.load(Path(folder) / "state")
    lost = [n for n in fixed if not torch.equal(fixed[n], dict(program.root.named_buffers())[n])]
    _demand(not lost, f"a checkpoint does not hold {lost}; register them as persistent buffers")


def training_resumes(subject: Subject) -> None:
    """A program that goes on from a checkpoint ends with the bits of one that was never interrupted."""
    program, other = subject.program(), subject.program(seed=subject.case.seed + 1)
    subject.train(program, rounds=2)
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder) / "state")
        other.load(Path(folder) / "state")
    for each in (program, other):
        subject.train(each, rounds=2, start=2)
    different = difference(_state(program.root), _state(other.root))
    _demand(
        different is None,
        f"after a checkpoint, {different} comes out different; keep what lives from step to step in buffers "
        "(ir.assign), and draw random numbers with PyTorch, in nodes marked random",
    )


def objectives_train_their_owner(subject: Subject) -> None:
    """After the backward pass of an owner's objectives, no parameter of another owner has a gradient."""
    program = subject.program()
    ir = program.ir
    owner_of = {id(p): o for o in ir.owners for p in ir.parameters(o).values() if p.requires_grad}
    parameters = {id(p): (name, p) for name, p in _trainable(program).items()}
    held: set[int] = set()

    def observe(instruction: Instruction, _: dict[str, Any]) -> None:
        nonlocal held
        now = {i for i, (_, p) in parameters.items() if p.grad is not None}
        if isinstance(instruction, Backward):
            foreign = [parameters[i][0] for i in now - held if owner_of.get(i) != instruction.owner]
            _demand(
                not foreign,
                f"an objective of '{instruction.owner}' gives a gradient to {foreign}; bring foreign values "
                "in with ir.stop_gradient, and read no parameter of another module",
            )
        held = now

    for number, phase in enumerate(phases_of(program)):
        values = program.bind(*subject.case.batch(number))
        Trial(program).run(program.plan(phase), values, number, observe)


def modules_are_local(subject: Subject) -> None:
    """Every check of `locc.verify` holds: no gradient and no state crosses undeclared."""
    program = subject.program()
    subject.train(program)
    assert_local(program, *subject.case.batch())


def modules_are_isolated(subject: Subject) -> None:
    """In every phase, each module trains as it would alone, whatever becomes of other objectives."""
    program = subject.program(verify=True)
    for phase in phases_of(program):
        program.phase = phase
        assert_isolated(program, *subject.case.batch())
        program.step(*subject.case.batch(1))


def a_pipeline_trains_the_same(subject: Subject) -> None:
    """Where the certificate says so, pipelined training has the bits of lock-step training."""
    program = subject.program(verify=True)
    if program.certificate.pipeline_exact:
        assert_pipeline_exact(program, [subject.case.batch(number) for number in range(5)])


@contextmanager
def _in_float64() -> Iterator[None]:
    """Tell a method that computes in float32 alone what to do."""
    try:
        yield
    except (AssertionError, LoccError):
        raise
    except Exception as error:
        raise AssertionError(
            f"it fails on the model in float64 with {first_line(error)}; give auxiliaries and constants the "
            "dtype of the values that they meet (value.meta['spec'].dtype)"
        ) from error


def the_plan_computes_what_the_graph_means(subject: Subject) -> None:
    """In every phase, the lowered plan trains to the bits of `reference_step`, in float64."""
    with _in_float64():
        program, case = subject.double
        for phase in phases_of(program):
            program.phase = phase
            assert_lowered(program, *case.batch())


def module_programs_train_side_by_side(subject: Subject) -> None:
    """In every phase, the module programs train to the bits of the plan that they are cut out of."""
    with _in_float64():
        program, case = subject.double
        for phase in phases_of(program):
            program.phase = phase
            assert_side_by_side(program, [case.batch(number) for number in range(2)])


CONFORMANCE: dict[str, Callable[[Subject], None]] = {
    "one module is backpropagation": one_module_is_backpropagation,
    "every parameter has one optimizer": every_parameter_has_one_optimizer,
    "every parameter moves": every_parameter_moves,
    "inference is the model": inference_is_the_model,
    "inference reads no label": inference_reads_no_label,
    "fixed matrices stay": fixed_matrices_stay,
    "objectives train their owner": objectives_train_their_owner,
    "the plan computes what the graph means": the_plan_computes_what_the_graph_means,
    "module programs train side by side": module_programs_train_side_by_side,
    "modules are local": modules_are_local,
    "modules are isolated": modules_are_isolated,
    "a pipeline trains the same": a_pipeline_trains_the_same,
    "training resumes": training_resumes,
}
"""The checks by name, in the order in which they run."""
