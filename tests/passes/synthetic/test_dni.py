"""`dni`: the printed program, hand-written oracles, and what is to hold of synthetic gradients.

The authors' code is not public; read beside the paper: koz4k/dni-pytorch, a1ba1f2, dni.py. A module's update
is `BackwardInterface`, lines 99 to 175, the regression `_SyntheticGradientUpdater.backward`, lines 193 to
201, and synthetic inputs `ForwardInterface`, lines 61 to 96. Ours departs in three places: it predicts the
gradients of single samples' losses, so that B may change; the bias of a synthesiser's last layer starts at
zero, too; and the inputs' error is summed over units, where theirs is their mean.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc import Program
from locc.errors import MethodError
from locc.ir import TensorSpec
from locc.testing import assert_lowered, assert_side_by_side
from support import Residual, Tied, batch, close, compiled, mlp, sgd, snapshot

SPLITS = ["relu1", "relu2"]


def linear(value: TensorSpec, output: TensorSpec) -> nn.Module:
    """A synthesiser without batch statistics, not at zero."""
    (width,) = value.features
    return nn.Linear(width, width)


# ---- the program -------------------------------------------------------------------------------


AFTER = """\
# 3 modules: relu1, relu2, third
def step(self, input_1, target):
    # ---- module 0: relu1
    first = self.first(input_1)  # f32[B,8]
    relu1 = self.relu1(first)  # f32[B,8]
    # ---- auxiliary: relu1.synthesiser, learning rate x0.1
    relu1_at_relu1_synthesiser = stop_gradient(relu1)  # f32[B,8]
    aux_relu1_synthesiser = self.aux.relu1_synthesiser(relu1_at_relu1_synthesiser)  # f32[B,8]
    # ---- module 0: relu1
    aux_relu1_synthesiser_at_relu1 = stop_gradient(aux_relu1_synthesiser)  # f32[B,8]
    synthetic = of_batch(aux_relu1_synthesiser_at_relu1, 0)  # f32[B,8]
    chain = inner(relu1, synthetic)  # f32[]
    objective(chain)  # relu1.synthetic
    # ---- module 1: relu2
    relu1_at_relu2 = stop_gradient(relu1)  # f32[B,8]
    drop = self.drop(relu1_at_relu2)  # f32[B,8]
    second = self.second(drop)  # f32[B,8]
    relu2 = self.relu2(second)  # f32[B,8]
    # ---- auxiliary: relu2.synthesiser, learning rate x0.1
    relu2_at_relu2_synthesiser = stop_gradient(relu2)  # f32[B,8]
    aux_relu2_synthesiser = self.aux.relu2_synthesiser(relu2_at_relu2_synthesiser)  # f32[B,8]
    # ---- module 1: relu2
    aux_relu2_synthesiser_at_relu2 = stop_gradient(aux_relu2_synthesiser)  # f32[B,8]
    synthetic_1 = of_batch(aux_relu2_synthesiser_at_relu2, 0)  # f32[B,8]
    chain_1 = inner(relu2, synthetic_1)  # f32[]
    objective(chain_1)  # relu2.synthetic
    grad_relu1_at_relu2 = gradient(chain_1, relu1_at_relu2)  # f32[B,8]
    # ---- auxiliary: relu1.synthesiser, learning rate x0.1
    grad_relu1_at_relu2_at_relu1_synthesiser = stop_gradient(grad_relu1_at_relu2)  # f32[B,8]
    target_2 = of_sample(grad_relu1_at_relu2_at_relu1_synthesiser, 0)  # f32[B,8]
    regression_1 = squared_distance(aux_relu1_synthesiser, target_2, 0)  # f32[]
    objective(regression_1)  # relu1.synthesiser.regression
    # ---- module 2: third
    relu2_at_third = stop_gradient(relu2)  # f32[B,8]
    third = self.third(relu2_at_third)  # f32[B,3]
    loss = cross_entropy(third, target)  # f32[]
    objective(loss)  # third.loss
    grad_relu2_at_third = gradient(loss, relu2_at_third)  # f32[B,8]
    # ---- auxiliary: relu2.synthesiser, learning rate x0.1
    grad_relu2_at_third_at_relu2_synthesiser = stop_gradient(grad_relu2_at_third)  # f32[B,8]
    target_1 = of_sample(grad_relu2_at_third_at_relu2_synthesiser, 0)  # f32[B,8]
    regression = squared_distance(aux_relu2_synthesiser, target_1, 0)  # f32[]
    objective(regression)  # relu2.synthesiser.regression
    return third
"""


def test_the_printed_program() -> None:
    assert str(compiled(mlp(), "dni", SPLITS, lr_scale=0.1).ir) == AFTER


def test_a_module_updates_before_the_next_one_runs() -> None:
    """Update-unlocked: nothing of a later module comes between a module's forward and its update."""
    lines = str(compiled(mlp(), "dni", SPLITS).plan()).splitlines()
    updates = [i for i, line in enumerate(lines) if line in ("relu1: update", "relu2: update")]
    starts = [
        next(i for i, line in enumerate(lines) if line.startswith(f"{m}: forward"))
        for m in ("relu2", "third")
    ]
    assert all(update < start for update, start in zip(updates, starts, strict=True))


# ---- oracles -----------------------------------------------------------------------------------


def by_hand(
    model: nn.Sequential, nets: list[nn.Module], x: Tensor, y: Tensor, rate: float, trace: float = 0.0
) -> list[float]:
    """One SGD step of DNI on `mlp` with a mean loss: bootstrapped, per-sample synthetic gradients.

    `nets` are two synthesisers, and after them those of the inputs of the second and third module, if any.
    """
    size = len(x)
    h1 = model.relu1(model.first(x))
    s1 = nets[0](h1.detach())
    guesses = [net(x) for net in nets[2:]]
    in2 = (guesses[0] if guesses else h1).detach().requires_grad_()
    h2 = model.relu2(model.second(in2))
    s2 = nets[1](h2.detach())
    in3 = (guesses[1] if guesses else h2).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model.third(in3), y)
    (h1 * s1.detach() / size).sum().backward()
    (h2 * s2.detach() / size).sum().backward(retain_graph=True)
    loss.backward()
    assert in3.grad is not None
    back = (1 - trace) * s2.detach() / size + trace * in3.grad
    (d2,) = torch.autograd.grad(h2, in2, back)
    errors = [((s - size * d) ** 2).sum(1).mean() for s, d in ((s1, d2), (s2, in3.grad))]
    missed = [((g - h.detach()) ** 2).sum(1).mean() for g, h in zip(guesses, (h1, h2), strict=False)]
    torch.autograd.backward([*errors, *missed])
    with torch.no_grad():
        for p in (*model.parameters(), *nn.ModuleList(nets).parameters()):
            assert p.grad is not None
            p -= rate * p.grad
            p.grad = None
    return [float(v.detach()) for v in (*errors, loss)]


@pytest.mark.parametrize("options", [{}, {"trace": 0.3}, {"inputs": True, "width": 16}])
def test_steps_equal_the_formulas(options: dict[str, Any]) -> None:
    model = mlp().double()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, "dni", SPLITS, optimizer=sgd(0.05), factory=linear, **options)
    names = [
        *(f"{name}_synthesiser" for name in SPLITS),
        *(["relu2_inputs", "third_inputs"] * ("inputs" in options)),
    ]
    aux = [program.root.aux[name] for name in names]
    other, nets = copy.deepcopy(model), copy.deepcopy(aux)
    for _ in range(4):
        report = program.step(x, y)
        expected = by_hand(other, nets, x, y, 0.05, options.get("trace", 0.0))
        names = ["relu1.synthesiser.regression", "relu2.synthesiser.regression", "third.loss"]
        for name, value in zip(names, expected, strict=True):
            assert abs(float(report.objectives[name]) - value) < 1e-10
        for a, b in ((model, other), *zip(aux, nets, strict=True)):
            close(a, b)


def test_synthetic_inputs_unlock_the_forward_pass_and_end_with_training() -> None:
    model = mlp()
    x, y = batch()
    program = compiled(model, "dni", SPLITS, width=16, inputs=True)
    owners = program.certificate.owners
    assert [o.name for o in owners if o.forward_locked] == ["relu2.inputs", "third.inputs"]
    assert [o.name for o in owners if o.update_locked] == ["relu1.synthesiser", "relu2.synthesiser"]
    program.step(x, y)
    program.eval()
    with torch.no_grad():
        for p in program.root.aux.parameters():
            p.fill_(float("nan"))
    assert torch.equal(program(x), model(x))


def test_with_a_trace_and_synthetic_inputs_its_plan_and_module_programs_mean_the_same() -> None:
    x, y = batch()
    program = compiled(Residual(), "dni", ["blocks.0", "blocks.1"], trace=0.5, inputs=True, width=8)
    assert not program.certificate.warnings
    assert_lowered(program, x, y, steps=2)
    assert_side_by_side(program, [(x, y)] * 2)


def test_inputs_that_nothing_is_predicted_from_are_refused() -> None:
    tokens = torch.randint(11, (4, 7))
    with pytest.raises(MethodError, match=r"takes 'tokens', i64\[B,7\], so leave inputs=False"):
        locc.compile(Tied(), "dni", ["embed"], example_inputs=tokens, tied="owner", inputs=True)


class Oracle(nn.Module):
    """Returns the gradient that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h) if self.told is None else self.told


def true_gradients(program: Program, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss with respect to every value that crosses a cut, by plain backpropagation."""
    values: dict[str, Tensor] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and result.requires_grad:
                result.retain_grad()
                values[n.name.removeprefix("model_")] = result
            return result

    (output,) = Keep(torch.fx.GraphModule(program.root, program.ir.captured.training)).run(x)
    nn.functional.cross_entropy(output, y).backward()
    found = {name: v.grad for name, v in values.items() if v.grad is not None}
    program.model.zero_grad()
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_oracle_makes_it_backpropagation(reduction: str) -> None:
    """On a model with residual connections, where modules send two values, and a value has two readers."""
    model = Residual().double()
    twin = copy.deepcopy(model)
    x, y = batch(dtype=torch.float64)
    program = compiled(
        model, "dni", ["blocks.*"], optimizer=sgd(0.3), factory=lambda *_: Oracle(), reduction=reduction
    )
    bp = compiled(twin, "bp", ["blocks.*"], optimizer=sgd(0.3))
    assert len(program.root.aux) == 4
    for _ in range(3):
        for network, slope in asked_of(program, model, x, y).items():
            network.told = slope * (len(x) if reduction == "mean" else 1)
        report = program.step(x, y)
        bp.step(x, y)
        for name, value in report.objectives.items():
            if "regression" in name:
                assert float(value) < 1e-20
        close(model, twin, 1e-12)


@pytest.mark.parametrize(("trace", "apart"), [(1.0, False), (0.5, True)])
def test_with_trace_1_targets_are_those_of_backpropagation(trace: float, apart: bool) -> None:
    """Whatever the other synthesisers predict: one at a time is told the truth, the others nonsense."""
    model = Residual().double()
    x, y = batch(dtype=torch.float64)
    program = compiled(
        model, "dni", ["blocks.*"], optimizer=sgd(1e-9), factory=lambda *_: Oracle(), trace=trace
    )
    names = [n.meta["objective"] for n in program.ir.objectives() if "regression" in n.meta["objective"]]
    found = []
    for k in range(4):
        for i, (network, slope) in enumerate(asked_of(program, model, x, y).items()):
            network.told = slope * len(x) if i == k else torch.ones_like(slope)
        report = program.step(x, y)
        found.append(min(float(report.objectives[name]) for name in names))
    # The last block's target is the gradient of the loss, whatever the trace.
    assert (max(found) > 1e-3) == apart
    assert apart or max(found) < 1e-20


def asked_of(program: Program, model: Residual, x: Tensor, y: Tensor) -> dict[Oracle, Tensor]:
    """The gradient of the loss that each network of `aux` is to predict."""
    slopes = true_gradients(program, x, y)
    # What is predicted of `inp` is what comes back from its readers in other modules.
    slopes["inp"] = slopes["inp"] - through_block(model, slopes["blocks_0"], x)
    calls = {n.target: n.meta["predicts"].name for n in program.ir.graph.nodes if "predicts" in n.meta}
    asked: dict[Any, Tensor] = {
        network: slopes[calls[f"aux.{key}"]] for key, network in program.root.aux.items()
    }
    return asked


def through_block(model: Residual, slope: Tensor, x: Tensor) -> Tensor:
    h = model.inp(x).detach().requires_grad_()
    (found,) = torch.autograd.grad(model.blocks[0](h), h, slope)
    return found


def test_the_first_hidden_update_is_zero_and_the_second_is_not() -> None:
    model = mlp()
    x, y = batch()
    program = compiled(model, "dni", SPLITS, width=16)
    network = program.root.aux["relu2_synthesiser"]
    assert network.last.weight.shape == (8, 16)
    assert not network.last.weight.any()
    assert not network.last.bias.any()
    before = snapshot(model)
    program.step(x, y)
    after = snapshot(model)
    still = ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert [k for k in before if torch.equal(before[k], after[k])] == still
    assert network.last.weight.any()
    assert network.last.bias.any()
    program.step(x, y)
    assert not torch.equal(after["second.weight"], model.second.weight)


# ---- pitfalls ----------------------------------------------------------------------------------


def test_a_lent_parameter_gets_the_borrowers_gradient() -> None:
    tokens = torch.randint(11, (4, 7))
    model = Tied()
    program = locc.compile(
        model, "dni", ["embed", "mid"], example_inputs=tokens, tied="owner", optimizer=sgd(1.0)
    )
    before = copy.deepcopy(model)
    hidden = torch.tanh(before.mid(before.embed(tokens))).detach()
    nn.functional.cross_entropy((hidden @ before.head.weight.T).flatten(0, 1), tokens.flatten()).backward()
    program.step(tokens, tokens)
    grad = before.embed.weight.grad
    assert grad is not None
    # The synthetic part of the first step is zero.
    assert torch.allclose(before.embed.weight - model.embed.weight, grad, atol=1e-6)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "average"}, "reduction='average'"),
        ({"lr_scale": 0.0}, "lr_scale"),
        ({"width": 0}, "width"),
        ({"trace": 1.5}, "trace=1.5: give a share"),
        ({"labels": True}, "no option 'labels'"),
        (
            {"factory": lambda value, output: nn.Linear(8, 9)},
            "synthesiser of module 'relu1' for .* gives shape",
        ),
        ({"factory": lambda value, output: torch.relu}, "not a module"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        compiled(mlp(), "dni", SPLITS, **options)
