"""`assert_conforms` sees what is wrong with a method, and names the check that says so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import locc
from locc import Method, Pass
from locc.ir import TrainingGraph
from locc.rewrite import AttachHeads, LocalLoss, OutputLoss, activations
from locc.testing import CONFORMANCE, CONFORMANCE_MODELS, assert_conforms

RUN = {"modules are isolated", "a pipeline trains the same", "module programs train side by side"}
TWO = {name: CONFORMANCE_MODELS[name] for name in ("mlp", "residual")}
ONE = {"mlp": TWO["mlp"]}


@dataclass(frozen=True)
class Greedy(Method):
    """Decoupled greedy learning, as it should be, and one more pass that spoils it."""

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "a test"
    spoil: Pass | None = None

    def passes(self) -> Sequence[Pass]:
        return (AttachHeads("linear"), LocalLoss(), OutputLoss(), *([self.spoil] if self.spoil else []))


def first_two(ir: TrainingGraph) -> tuple[str, str]:
    return ir.modules[0].name, ir.modules[1].name


def pull(name: str, parameter: Tensor) -> object:
    def penalty(h: Tensor) -> Tensor:
        return parameter.square().sum() + 0 * h.sum()

    penalty.__name__ = penalty.__qualname__ = name
    return penalty


class Foreign(Pass):
    """The first module's objective moves a parameter of the second, unseen by the graph."""

    def rewrite(self, ir: TrainingGraph) -> None:
        if len(ir.modules) > 1:
            first, second = first_two(ir)
            theirs = next(iter(ir.parameters(second).values()))
            found = ir.emit(first, pull("penalty", theirs), activations(ir, first)[0])
            ir.objective(first, found, "penalty")


class Whisper(Pass):
    """The second module learns from what the first one leaves in a Python list."""

    def rewrite(self, ir: TrainingGraph) -> None:
        if len(ir.modules) > 1:
            kept: list[Tensor] = []

            def keep(h: Tensor) -> Tensor:
                kept[:] = [h.detach()]
                return 0 * h.sum()

            def heard(h: Tensor) -> Tensor:
                return (h * kept[0].mean()).sum() if kept else h.sum()

            for owner, function in zip(first_two(ir), (keep, heard), strict=True):
                ir.objective(owner, ir.emit(owner, function, activations(ir, owner)[0]), "whisper")


class Flat(Pass):
    """The first module's only objective has no slope."""

    def rewrite(self, ir: TrainingGraph) -> None:
        for objective in ir.objectives(ir.modules[0].name) if len(ir.modules) > 1 else ():
            (scalar,) = objective.all_input_nodes
            objective.replace_input_with(scalar, ir.emit(scalar.meta["owner"], torch.sign, scalar))


class Hooked(Pass):
    """Training leaves a hook behind that changes what the user's model returns."""

    def rewrite(self, ir: TrainingGraph) -> None:
        if len(ir.modules) > 1:
            ir.root.model.register_forward_hook(lambda module, args, result: 2 * result)


class Memory(nn.Module):
    """Keeps the mean of a target."""

    label: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("label", torch.zeros(()))


class Remembering(Pass):
    """Evaluating leaves something of the labels in a buffer."""

    def rewrite(self, ir: TrainingGraph) -> None:
        memory, loss = Memory(), ir.loss_function
        ir.add_module("memory", memory)

        def remembering(output: Tensor, target: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                memory.label.copy_(target.float().mean())
            return loss(output, target)

        ir.loss_function = remembering


class Holder(nn.Module):
    """A matrix that is said to be fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.ones(4))

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.matrix.mul_(1.5)
        return h * self.matrix.sum()


class Drifting(Pass):
    """A matrix that should be fixed grows with each step."""

    def rewrite(self, ir: TrainingGraph) -> None:
        for module in ir.modules[:-1]:
            (h, *_) = activations(ir, module.name)
            found = ir.call(module.name, ir.add_module("matrix", Holder()), h, role="feedback")
            ir.objective(module.name, ir.emit(module.name, torch.mean, found), "drift")


class Counting(Pass):
    """A weight that grows with each step, in a Python object that no checkpoint holds."""

    def rewrite(self, ir: TrainingGraph) -> None:
        seen = [0]

        def grown(h: Tensor) -> Tensor:
            seen[0] += 1
            return seen[0] * h.square().mean()

        for module in ir.modules[:-1]:
            ir.objective(module.name, ir.emit(module.name, grown, activations(ir, module.name)[0]), "grown")


class Single(Pass):
    """A head that computes in float32 alone."""

    def rewrite(self, ir: TrainingGraph) -> None:
        for module in ir.modules[:-1]:
            (h, *_) = activations(ir, module.name)
            found = ir.call(module.name, ir.add_module("single", nn.Linear(4, 1)), h, role="head")
            ir.objective(module.name, ir.emit(module.name, torch.mean, found), "single")


class Silent(Pass):
    """Refuses with too few words."""

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        yield "no"

    def rewrite(self, ir: TrainingGraph) -> None:
        raise NotImplementedError


class Kept(Pass):
    """An auxiliary stays in the inference path."""

    def rewrite(self, ir: TrainingGraph) -> None:
        end = next(n for n in ir.inference.nodes if n.op == "output")
        for value in end.all_input_nodes:
            with ir.inference.inserting_before(end):
                made = ir.inference.call_module(ir.add_module("kept", nn.Identity()), (value,))
            made.meta.update(value.meta)
            end.replace_input_with(value, made)


class Shared(Pass):
    """An auxiliary owner trains the first module's weight as well."""

    def rewrite(self, ir: TrainingGraph) -> None:
        helper = ir.add_owner("helper", ir.modules[0]).name
        weight = ir.read(helper, next(iter(ir.parameters(ir.modules[0].name))))
        ir.objective(helper, ir.emit(helper, torch.mean, weight), "shared")


class Doubled(Pass):
    """The last module gets another objective, on the uncut model too."""

    def rewrite(self, ir: TrainingGraph) -> None:
        owner = ir.last.name
        ir.objective(owner, ir.emit(owner, torch.std, ir.prediction), "more")


def named(error: AssertionError) -> set[str]:
    """Return the checks that an error names."""
    return set(re.findall(rf"model '\w+', ({'|'.join(CONFORMANCE)}): ", str(error)))


def test_a_sound_method_conforms_and_says_on_what() -> None:
    report = assert_conforms(Greedy, TWO)
    assert report.admitted == tuple(TWO)
    assert not report.refused
    assert report.checks == tuple(CONFORMANCE)
    assert str(report).startswith(f"method 'Greedy' conforms: {len(CONFORMANCE)} checks on mlp, residual\n")


@pytest.mark.parametrize(
    ("spoil", "checks"),
    [
        (Doubled, {"one module is backpropagation"}),
        (Flat, {"every parameter moves"}),
        (Hooked, {"inference is the model"}),
        (Remembering, {"inference reads no label"}),
        (Drifting, {"fixed matrices stay"}),
        (Foreign, {"objectives train their owner", "modules are local", *RUN}),
        (Whisper, RUN),
        (Single, {"the plan computes what the graph means", "module programs train side by side"}),
        (Counting, {*RUN, "training resumes", "the plan computes what the graph means"}),
    ],
)
def test_a_broken_method_fails_its_checks(spoil: type[Pass], checks: set[str]) -> None:
    with pytest.raises(AssertionError, match="method 'Greedy' does not conform") as found:
        assert_conforms(Greedy(spoil()), ONE)
    assert named(found.value) == checks, found.value


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (Silent, 'it is refused with .*undefined on this model: no"; let `requires` say in one sentence'),
        (Kept, r"it does not compile: GraphError: .* no longer computes the captured model"),
        (Shared, "it does not compile: GraphError"),
    ],
)
def test_a_method_that_cannot_be_compiled(spoil: type[Pass], sentence: str) -> None:
    with pytest.raises(AssertionError, match=f"model 'mlp': {sentence}"):
        assert_conforms(Greedy(spoil()), ONE)


def test_a_method_that_admits_nothing_was_not_tested() -> None:
    with pytest.raises(
        AssertionError, match=r"'al' admits none of 1 models.*\n- model 'residual': .* 2 values pass"
    ):
        assert_conforms("al", {"residual": CONFORMANCE_MODELS["residual"]})


def test_a_method_that_is_none() -> None:
    with pytest.raises(
        locc.LoccError, match=r"there is no check 'modules are locale'; .*'modules are local'"
    ):
        assert_conforms(Greedy, TWO, checks=["modules are locale"])
    with pytest.raises(locc.MethodError, match="there is no method 'bq'"):
        assert_conforms("bq")
