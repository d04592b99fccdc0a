"""`np-sg`: the printed program, its formulas in NumPy, and what its matrices learn.

The authors' formulation (benlansdell/synthfeedback, 00bffe0, models/npmodels.py): `NPModel4`, lines 137 to
217, and for the least squares `NPModel4_ExactLsq`, lines 250 to 354. Ours departs in three places: each
sample's noise meets the change of its own loss, there that of the batch's sum (a later class of theirs,
`CorrectBatch`, mends it); the unit that stands for the bias has no noise; and in SGD sums over the batch are
means, with the square's factor 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import locc
from locc.errors import MethodError
from locc.rewrite import noise
from locc.runtime.report import StepReport
from locc.testing import reference_step
from support import Residual, batch, compiled, mlp, sgd

SPLITS = ["relu1", "relu2"]

AFTER = """\
# 2 modules: second, third
def step(self, input_1, target):
    # ---- module 0: second
    model_second = self.second
    first = self.first(input_1)  # f32[B,8]
    relu1 = self.relu1(first)  # f32[B,8]
    drop = self.drop(relu1)  # f32[B,8]
    noise = gaussian(drop, 0.05)  # f32[B,8]
    noise_1 = drop + noise  # f32[B,8]
    # ---- auxiliary: second.feedback, learning rate x0.5
    aux_feedback_second_matrix = self.aux.feedback_second.matrix  # f32[8,8]
    noise_at_second_feedback = stop_gradient(noise)  # f32[B,8]
    # ---- module 0: second
    aux_feedback_second_matrix_at_second = stop_gradient(aux_feedback_second_matrix)  # f32[8,8]
    second = feedback_layer(drop, model_second, aux_feedback_second_matrix_at_second)  # f32[B,8]
    perturbed = feedback_layer(noise_1, model_second, aux_feedback_second_matrix_at_second)  # f32[B,8]
    # ---- module 1: third
    model_third = self.third
    second_at_third = stop_gradient(second)  # f32[B,8]
    relu2 = self.relu2(second_at_third)  # f32[B,8]
    perturbed_at_third = stop_gradient(perturbed)  # f32[B,8]
    noise_2 = gaussian(relu2, 0.05)  # f32[B,8]
    model_relu2 = self.relu2(perturbed_at_third)  # f32[B,8]
    noise_3 = model_relu2 + noise_2  # f32[B,8]
    # ---- auxiliary: third.feedback, learning rate x0.5
    aux_feedback_third_matrix = self.aux.feedback_third.matrix  # f32[3,8]
    noise_2_at_third_feedback = stop_gradient(noise_2)  # f32[B,8]
    # ---- module 1: third
    aux_feedback_third_matrix_at_third = stop_gradient(aux_feedback_third_matrix)  # f32[3,8]
    third = feedback_layer(relu2, model_third, aux_feedback_third_matrix_at_third)  # f32[B,3]
    loss = cross_entropy(third, target)  # f32[]
    objective(loss)  # third.loss
    grad_second_at_third = gradient(loss, second_at_third)  # f32[B,8]
    perturbed_1 = feedback_layer(noise_3, model_third, aux_feedback_third_matrix_at_third)  # f32[B,3]
    perturbed_1_at_third = stop_gradient(perturbed_1)  # f32[B,3]
    losses = sample_losses(perturbed_1_at_third, target)  # f32[B]
    third_at_third = stop_gradient(third)  # f32[B,3]
    losses_1 = sample_losses(third_at_third, target)  # f32[B]
    losses_2 = losses - losses_1  # f32[B]
    grad_third = gradient(loss, third)  # f32[B,3]
    # ---- module 0: second
    grad_second_at_third_at_second = stop_gradient(grad_second_at_third)  # f32[B,8]
    chain = inner(second, grad_second_at_third_at_second)  # f32[]
    objective(chain)  # second.chain
    grad_second = gradient(chain, second)  # f32[B,8]
    # ---- auxiliary: second.feedback, learning rate x0.5
    grad_second_at_second_feedback = stop_gradient(grad_second)  # f32[B,8]
    error = of_sample(grad_second_at_second_feedback)  # f32[B,8]
    losses_2_at_second_feedback = stop_gradient(losses_2)  # f32[B]
    estimate = estimated(losses_2_at_second_feedback, noise_at_second_feedback, 0.05)  # f32[B,8]
    sent = returned(error, aux_feedback_second_matrix, estimate)  # f32[B,8]
    regression = squared_distance(sent, estimate)  # f32[]
    objective(regression)  # second.feedback.regression
    # ---- auxiliary: third.feedback, learning rate x0.5
    grad_third_at_third_feedback = stop_gradient(grad_third)  # f32[B,3]
    error_1 = of_sample(grad_third_at_third_feedback)  # f32[B,3]
    losses_2_at_third_feedback = stop_gradient(losses_2)  # f32[B]
    estimate_1 = estimated(losses_2_at_third_feedback, noise_2_at_third_feedback, 0.05)  # f32[B,8]
    sent_1 = returned(error_1, aux_feedback_third_matrix, estimate_1)  # f32[B,8]
    regression_1 = squared_distance(sent_1, estimate_1)  # f32[]
    objective(regression_1)  # third.feedback.regression
    return third
"""


def test_the_printed_program() -> None:
    assert str(compiled(mlp(), "np-sg", ["second"], noise=0.05, lr_scale=0.5).ir) == AFTER


def softmax_error(a: Any, y: Any) -> Any:
    e = np.exp(a - a.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True) - np.eye(a.shape[1])[y]


def losses(a: Any, y: Any) -> Any:
    top = a.max(1, keepdims=True)
    return (np.log(np.exp(a - top).sum(1)) + top[:, 0]) - a[np.arange(len(y)), y]


@pytest.mark.parametrize("solver", ["sgd", "least-squares"])
@pytest.mark.parametrize("splits", [["relu1", "relu2"], ["relu2"], []])
def test_steps_equal_the_formulas(splits: list[str], solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the network is cut: noise on what two layers read, errors of the pass without."""
    c, rate = 0.2, 0.3
    drawn = c * np.random.default_rng(1).normal(size=(2, 5, 8))
    order: list[int] = []

    def known(h: torch.Tensor, sigma: float) -> torch.Tensor:
        if len(h) != 5 or h.device.type == "meta":
            return torch.zeros_like(h)
        order.append(len(order))
        return torch.tensor(drawn[order[-1] % 2])

    monkeypatch.setattr(noise, "gaussian", known)
    model = mlp().double()
    x, y = batch(dtype=torch.float64)
    options: dict[str, Any] = {"noise": c, "solver": solver, "gamma": 0.7}
    program = compiled(model, "np-sg", splits, optimizer=sgd(rate), verify=False, **options)
    order.clear()
    p = {n: v.detach().numpy().copy() for n, v in program.root.state_dict().items()}
    w, b = ([p[f"model.{n}.{k}"] for n in ("first", "second", "third")] for k in ("weight", "bias"))
    feedback = [p[f"aux.feedback_{n}.matrix"] for n in ("second", "third")]
    squares, products = [0.7 * np.eye(8), 0.7 * np.eye(3)], [np.zeros((8, 8)), np.zeros((3, 8))]
    data, labels = x.numpy(), y.numpy()
    for _ in range(3):
        program.step(x, y)
        a1 = data @ w[0].T + b[0]
        h1 = np.maximum(a1, 0)
        a2 = h1 @ w[1].T + b[1]
        h2 = np.maximum(a2, 0)
        a3 = h2 @ w[2].T + b[2]
        noisy = np.maximum((h1 + drawn[0]) @ w[1].T + b[1], 0) + drawn[1]
        change = losses(noisy @ w[2].T + b[2], labels) - losses(a3, labels)
        d3 = softmax_error(a3, labels)
        d2 = (d3 @ feedback[1]) * (a2 > 0)
        d1 = (d2 @ feedback[0]) * (a1 > 0)
        estimates = [change[:, None] * xi / c**2 for xi in drawn]
        if solver == "least-squares":
            squares = [v + d.T @ d for v, d in zip(squares, (d2, d3), strict=True)]
            products = [s + d.T @ e for s, d, e in zip(products, (d2, d3), estimates, strict=True)]
        missed = [d @ m - e for d, m, e in zip((d2, d3), feedback, estimates, strict=True)]
        feedback = [m - rate * 2 / 5 * d.T @ r for m, d, r in zip(feedback, (d2, d3), missed, strict=True)]
        if solver == "least-squares":
            feedback = [np.linalg.inv(v) @ s for v, s in zip(squares, products, strict=True)]
        for k, (d, h) in enumerate(((d1, data), (d2, h1), (d3, h2))):
            w[k] = w[k] - rate * d.T @ h / 5
            b[k] = b[k] - rate * d.mean(0)
        found = program.root.state_dict()
        for k, name in enumerate(("first", "second", "third")):
            assert np.abs(found[f"model.{name}.weight"].numpy() - w[k]).max() < 1e-10
            assert np.abs(found[f"model.{name}.bias"].numpy() - b[k]).max() < 1e-10
        for k, name in enumerate(("second", "third")):
            assert np.abs(found[f"aux.feedback_{name}.matrix"].numpy() - feedback[k]).max() < 1e-10


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, stride=2), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def parametrised() -> nn.Sequential:
    model = convolutions()
    parametrizations.weight_norm(model[2])
    parametrizations.spectral_norm(model[5])
    return model


@pytest.mark.parametrize("kind", ["residual", "convolutions", "parametrised"])
def test_matrices_that_equal_the_weights_are_at_rest(kind: str) -> None:
    """On 20,000 samples, up to chance; beside a skip, too, as the noise is on the layer's input alone."""
    torch.manual_seed(0)
    made = {"residual": lambda: Residual(2), "convolutions": convolutions, "parametrised": parametrised}
    model = made[kind]().double()
    x = torch.randn(20_000, *((4,) if kind == "residual" else (1, 6, 6))).double()
    y = torch.randint(3, (20_000,))
    program = compiled(model, "np-sg", 2, example_inputs=x[:2], noise=1e-3, optimizer=sgd(1.0), seed=0)
    for module in program.ir.modules:
        program.optimizers[module.name].param_groups[0]["lr"] = 0.0
    weights = {
        f"aux.feedback_{k.replace('.', '_')}": m.weight
        for k, m in model.named_modules()
        if k and hasattr(m, "weight")
    }
    learned = {k: p for k, p in program.root.named_parameters() if k.startswith("aux.")}

    def moves(zero: str) -> dict[str, float]:
        with torch.no_grad():
            for k, p in learned.items():
                p.copy_(weights[k.removesuffix(".matrix")] * (k != zero))
        before = {k: p.detach().clone() for k, p in learned.items()}
        program.step(x, y)
        return {k: float((p.detach() - before[k]).norm()) for k, p in learned.items()}

    resting = moves("")
    assert len(learned) == (3 if kind == "residual" else 2)
    for name in learned:
        assert resting[name] < 0.15 * moves(name)[name], name


@pytest.mark.parametrize("train", [locc.Program.step, reference_step])
def test_dropout_drops_the_same_units_in_both_passes(train: Callable[..., StepReport]) -> None:
    """Else the loss would change by more than the noise makes it, and the estimate be of the size 1 / c."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, "np-sg", ["1", "2"], noise=1e-6)
    assert "model_3 = self[3](perturbed_at_5)  # f64[B,8], draws as layer_3" in str(program.ir)
    for _ in range(2):
        found = train(program, x, y).objectives
        assert 0 < found["2.feedback.regression"] < 100


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (mlp(), {"noise": 0.0}, "noise=0.0"),
        (mlp(), {"reduction": "average"}, "reduction='average'"),
        (mlp(), {"solver": "least"}, "solver='least'; .*least-squares"),
    ],
)
def test_what_it_is_not_defined_for_is_refused(model: nn.Module, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        compiled(model, "np-sg", SPLITS, **options)


def test_a_weight_of_two_modules_is_refused() -> None:
    weight = nn.Linear(4, 4).requires_grad_(False)  # what trains has one owner
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), weight, nn.Tanh(), weight, nn.Linear(4, 3))
    with pytest.raises(MethodError, match="modules '3' and 'output' share the weight of '2', "):
        compiled(model, "np-sg", ["1", "3"])


def test_least_squares_fits_linear_layers() -> None:
    with pytest.raises(MethodError, match="layer '2' is a Conv2d, and the least-squares fit"):
        compiled(convolutions(), "np-sg", 2, example_inputs=torch.randn(2, 1, 6, 6), solver="least-squares")


def test_a_layer_called_twice_is_fitted_to_both_calls() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(8, 3))
    program = compiled(model, "np-sg", [], solver="least-squares")
    program.step(*batch())
    assert [name for name, _ in program.root.named_buffers() if "V_2" in name] == [
        "aux.V_2.initial",
        "aux.V_2.value",
    ]


def test_the_feedback_may_learn_alone_at_first() -> None:
    program = compiled(mlp(), "np-sg", SPLITS, warmup=2)
    assert [(p.name, p.epochs, p.warmup) for p in program.ir.phases] == [
        ("warmup", 2, True),
        ("train", 1, False),
    ]
    assert program.ir.phases[0].trains == ("relu2.feedback", "third.feedback")
