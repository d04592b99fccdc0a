"""Each module's own program: its text, what passes between programs, that they train what the plan does."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import locc
from locc import Program
from locc.errors import LoccError
from locc.ir import Repeat, TensorSpec, TrainingGraph, carry
from locc.ir.memory import memories
from locc.ir.view import node_tensors
from locc.lower import Instruction, ModuleProgram, Send, program_of
from locc.runtime.backends import BACKENDS, Eager
from locc.runtime.machine import Machine
from locc.testing import assert_side_by_side
from rules import Rule, finish, mean_square, repeat, sent
from support import Tied, batch, compiled, mlp, sgd

# ---- text ----------------------------------------------------------------------------------------


DTP = """\
# module 'second' with 'second.inverse'
# receives first from first: f32[B,8]
# receives grad_second_at_third from third: f32[B,8]
# sends second to third: f32[B,8]
# sends difference to first: f32[B,8]
def step(self):
    first = receive('first', source='first')
    first_at_second = stop_gradient(first)  # f32[B,8]
    relu1 = self.relu1(first_at_second)  # f32[B,8]
    drop = self.drop(relu1)  # f32[B,8]
    second = self.second(drop)  # f32[B,8]
    del first
    send(second, to=['third'])
    with no_grad():
        noise = with_noise(first_at_second, 0.3598)  # f32[B,8]
        model_relu1 = self.relu1(noise)  # f32[B,8]
        model_drop = self.drop(model_relu1)  # f32[B,8]
        model_second = self.second(model_drop)  # f32[B,8]
        second_at_second = stop_gradient(second)  # f32[B,8]
    del first_at_second
    model_second_at_second_inverse = stop_gradient(model_second)  # f32[B,8]
    aux_second_inverse = self.aux.second_inverse(model_second_at_second_inverse)  # f32[B,8]
    noise_at_second_inverse = stop_gradient(noise)  # f32[B,8]
    reconstruction = squared_distance(aux_second_inverse, noise_at_second_inverse, 0)  # f32[]
    del noise, model_second
    backward(reconstruction)  # second.inverse.reconstruction
    del reconstruction
    with no_grad():
        second_at_second_inverse = stop_gradient(second)  # f32[B,8]
        aux_second_inverse_2 = self.aux.second_inverse(second_at_second_inverse)  # f32[B,8]
    grad_second_at_third = receive('grad_second_at_third', source='third')
    with no_grad():
        grad_second_at_third_at_second = stop_gradient(grad_second_at_third)  # f32[B,8]
        target_1 = sub(second_at_second, grad_second_at_third_at_second, alpha=0.3277)  # f32[B,8]
    del second_at_second, grad_second_at_third
    target_1_at_second = stop_gradient(target_1)  # f32[B,8]
    distance = squared_distance(second, target_1_at_second, 0)  # f32[]
    del second
    backward(distance)  # second.target
    del distance
    update('second')
    with no_grad():
        target_1_at_second_inverse = stop_gradient(target_1)  # f32[B,8]
        aux_second_inverse_1 = self.aux.second_inverse(target_1_at_second_inverse)  # f32[B,8]
    del target_1
    update('second.inverse')
    with no_grad():
        difference = aux_second_inverse_1 - aux_second_inverse_2  # f32[B,8]
    del aux_second_inverse_2, aux_second_inverse_1
    send(difference, to=['first'])
    del difference
"""


def test_the_program_of_a_module_and_its_inverse_prints_as_python():
    programs = compiled(mlp(), "dtp", ["first", "second"], verify=False).module_programs
    assert str(programs["second"]) == DTP


# ---- programs of all kinds -----------------------------------------------------------------------

TOKENS = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(3))


def of_tokens(scores: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(scores.flatten(0, 1), tokens.flatten())


def tied(method: str) -> Program:
    """A head that borrows the embedding's weight."""
    options: dict[str, Any] = {"tied": "owner", "loss": of_tokens, "example_inputs": TOKENS}
    return locc.compile(Tied(), method, ["embed", "mid"], optimizer=sgd(), verify=False, **options)


def hidden(method: Any, splits: tuple[str, ...] = ("relu1", "relu2")) -> Callable[[], Program]:
    """A network with dropout."""
    return lambda: compiled(mlp(dropout=0.5), method, list(splits), optimizer=sgd(), seed=1, verify=False)


def lending(ir: TrainingGraph) -> None:
    """The last module reads a state of the first one, a view of its weight, what it sent two steps ago."""
    first, last = ir.modules[0].name, ir.last.name
    table = ir.state(first, "table", TensorSpec((3,), torch.float32), 0.5)
    ir.assign(first, table, ir.emit(first, tenth, ir.stop_gradient(first, sent(ir, first), "detached")))
    turned = ir.emit(first, torch.t, ir.read(first, "model.first.weight"))
    scaled = ir.emit(last, torch.mul, ir.output, ir.stop_gradient(last, table))
    shifted = ir.emit(last, plus, scaled, ir.stop_gradient(last, turned))
    old = ir.stop_gradient(last, ir.delay(sent(ir, first), 2))
    ir.objective(last, ir.emit(last, both, shifted, old), "lent")
    finish(ir)


def tenth(h: Tensor) -> Tensor:
    return h.mean(0)[:3] / 10


def plus(scaled: Tensor, turned: Tensor) -> Tensor:
    return scaled + turned[:3, :3].mean(0)


def both(shifted: Tensor, old: Tensor) -> Tensor:
    return mean_square(shifted) * old.square().mean().exp()


def conversing(ir: TrainingGraph) -> None:
    """In each round the last module answers the first one, which reads its own state; both read the end."""
    first, last = ir.modules[0].name, ir.last.name
    heard = ir.state(first, "heard", TensorSpec((), torch.float32), 1.0)
    start = ir.stop_gradient(first, sent(ir, first), role="start")
    before = set(ir.graph.nodes)
    code = ir.emit(first, carry, start)
    answer = ir.emit(last, answered, ir.stop_gradient(last, code), ir.boundaries(consumer=last)[0].entry)
    moved = ir.emit(first, torch.mul, ir.stop_gradient(first, answer), heard)
    ir.assign(first, heard, ir.emit(first, torch.mean, moved))
    repeat(ir, "talk", before)
    ir.repeats["talk"] = Repeat("talk", 3, ((code, moved),))
    for module in (ir.modules[0], ir.last):
        value = sent(ir, first) if module.name == first else ir.output
        end = ir.stop_gradient(module.name, moved, role="end")
        ir.objective(module.name, ir.emit(module.name, near, value, end), "end")
    finish(ir, first, last)


def answered(code: Tensor, own: Tensor) -> Tensor:
    return torch.tanh(code + own)


def near(value: Tensor, end: Tensor) -> Tensor:
    return (value - end[:, : value.shape[1]]).square().mean()


PROGRAMS: dict[str, Callable[[], Program]] = {
    "bp": hidden("bp"),
    "dtp": hidden("dtp"),
    "dni": hidden(locc.method("dni", width=8)),
    "altmin": hidden("altmin", ("first", "second")),
    "predsim": hidden("predsim"),
    "dfa": hidden("dfa"),
    "tied bp": lambda: tied("bp"),
    "tied dtp": lambda: tied("dtp"),
    "lending": hidden(Rule(lending)),
    "conversing": hidden(Rule(conversing)),
}


@cache
def program_named(name: str) -> Program:
    return PROGRAMS[name]()


def batches(name: str) -> list[tuple[Tensor, Tensor]]:
    if name.startswith("tied"):
        return [(TOKENS, TOKENS), (TOKENS.flip(0), TOKENS)]
    return [batch(5), batch(5)]


@pytest.fixture(params=PROGRAMS)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Program, list[tuple[Tensor, Tensor]]]]:
    """A program in each of its phases is left as it was found."""
    program = program_named(request.param)
    yield program, batches(request.param)
    program.phase = None


def groupings(program: Program) -> Iterator[list[tuple[str, ...]]]:
    """Each owner alone, modules by themselves and all auxiliaries together, and two that chance draws."""
    owners = list(program.ir.owners)
    yield [(owner,) for owner in owners]
    helpers = tuple(o for o in owners if program.ir.owners[o].auxiliary)
    modules = [(o,) for o in owners if o not in helpers]
    yield [helpers, *modules] if helpers else [(owners[0], owners[-1]), *modules[1:-1]]
    drawn = random.Random(program.method)
    for _ in range(2):
        homes: dict[int, list[str]] = {}
        for owner in drawn.sample(owners, len(owners)):
            homes.setdefault(drawn.randrange(len(owners)), []).append(owner)
        yield [tuple(group) for group in homes.values()]


def cut(program: Program, groups: list[tuple[str, ...]]) -> dict[str, ModuleProgram]:
    plan = program.plan(program.phase)
    running = [group for group in groups if set(group) & set(plan.runs)]
    return {group[0]: program_of(program.ir, plan, group) for group in running}


def test_programs_side_by_side_train_the_bits_of_the_plan(case):
    """However the owners are grouped, in every phase; each program prints as Python."""
    program, data = case
    for phase in [None, *(p.name for p in program.phases)]:
        program.phase = phase
        assert_side_by_side(program, data)
        for groups in groupings(program):
            programs = cut(program, groups)
            assert_side_by_side(program, data, programs=programs)
            for each in programs.values():
                ast.parse(str(each))


# ---- what a program touches ----------------------------------------------------------------------


class Touched(TorchDispatchMode):
    """The memory of every tensor that an operator reads, writes or returns."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.memory |= memories([args, kwargs, result])
        return result


class Watching(Eager):
    """Complains of an instruction that touches a parameter or buffer of an owner outside of its plan."""

    ir: TrainingGraph

    def run(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            with Touched() as touched:
                super().run([instruction])
            found = [path for path, memory in self.foreign.items() if memory in touched.memory]
            assert not found, f"{type(instruction).__name__} touches {found}"

    @cached_property
    def foreign(self) -> dict[str, int]:
        """What no code of the plan's owners holds, by path."""
        held = [(n, p, *memories(t)) for n in self.ir.graph.nodes for p, t in node_tensors(self.ir.root, n)]
        own = {memory for node, _, memory in held if node.meta["owner"] in self.plan.runs}
        return {path: memory for _, path, memory in held if memory not in own}


def test_no_program_touches_what_others_hold(case, monkeypatch):
    """Lent parameters and states arrive; none is read through the root."""
    program, data = case
    monkeypatch.setattr(Watching, "ir", program.ir, raising=False)
    monkeypatch.setitem(BACKENDS, "eager", Watching)
    for phase in [None, *(p.name for p in program.phases)]:
        program.phase = phase
        assert_side_by_side(program, data, programs=cut(program, [(o,) for o in program.ir.owners]))


def test_a_program_lists_what_it_receives_with_its_age_and_what_it_sends():
    programs = program_named("lending").module_programs
    last = programs["third"]
    found = {(str(item.spec), item.source, item.staleness) for item in last.receives}
    assert {("f32[3]", "relu1", 1), ("f32[4,8]", "relu1", 0), ("f32[B,8]", "relu1", 2)} <= found
    assert ("f32[B,8]", "relu2", 0) in found
    (late,) = [item.name for item in last.receives if item.staleness == 2]
    assert f"# receives {late} from relu1: f32[B,8], 2 step(s) old\n" in str(last)
    assert {late} <= {item.name for item in programs["relu1"].sends if item.to == ("third",)}


# ---- what goes wrong -----------------------------------------------------------------------------


@dataclass
class Broadcast:
    """A kind of instruction that nobody knows."""

    owner: str = "relu1"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()


def test_an_instruction_of_an_unknown_kind_is_an_error():
    program = program_named("bp")
    plan = replace(program.plan(), instructions=[Broadcast()], inputs=())
    module = program_of(program.ir, plan, ("relu1",))
    for use in (lambda: Machine(plan).run(plan.instructions), lambda: str(plan), lambda: str(module)):
        with pytest.raises(
            LoccError, match="the plan holds a Broadcast, which is no instruction; known: Segment,"
        ):
            use()


def test_a_value_that_is_sent_to_nobody_is_found():
    program = program_named("predsim")
    programs = program.module_programs
    head = next(iter(programs))
    loud = programs[head].plan
    name = next(i.writes[0] for i in loud.instructions if i.writes)
    extra = Send(head, name, ("third",), None)
    places = [k for k, i in enumerate(loud.instructions) if name in i.writes]
    told = [*loud.instructions[: places[0] + 1], extra, *loud.instructions[places[0] + 1 :]]
    talkative = replace(programs[head], plan=replace(loud, instructions=told))
    with pytest.raises(AssertionError, match="to the program of 'third', which it never receives"):
        assert_side_by_side(program, batches("predsim"), programs={**programs, head: talkative})
