"""`tp`: targets are the inverses themselves, without the difference correction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from locc.rewrite import noise
from support import Residual, batch, compiled, mlp, sgd, snapshot

ETA = 0.3277
SIGMA = 0.3598


AFTER = """\
# 3 modules: relu1, relu2, third
def step(self, input_1, target):
    # ---- module 0: relu1
    first = self.first(input_1)  # f32[B,8]
    relu1 = self.relu1(first)  # f32[B,8]
    # ---- module 1: relu2
    relu1_at_relu2 = stop_gradient(relu1)  # f32[B,8]
    drop = self.drop(relu1_at_relu2)  # f32[B,8]
    second = self.second(drop)  # f32[B,8]
    relu2 = self.relu2(second)  # f32[B,8]
    noise = with_noise(relu1_at_relu2, 0.3598)  # f32[B,8]
    model_drop = self.drop(noise)  # f32[B,8]
    model_second = self.second(model_drop)  # f32[B,8]
    model_relu2 = self.relu2(model_second)  # f32[B,8]
    relu2_at_relu2 = stop_gradient(relu2)  # f32[B,8]
    # ---- auxiliary: relu2.inverse
    model_relu2_at_relu2_inverse = stop_gradient(model_relu2)  # f32[B,8]
    aux_relu2_inverse = self.aux.relu2_inverse(model_relu2_at_relu2_inverse)  # f32[B,8]
    noise_at_relu2_inverse = stop_gradient(noise)  # f32[B,8]
    reconstruction = squared_distance(aux_relu2_inverse, noise_at_relu2_inverse, 0)  # f32[]
    objective(reconstruction)  # relu2.inverse.reconstruction
    # ---- module 2: third
    relu2_at_third = stop_gradient(relu2)  # f32[B,8]
    third = self.third(relu2_at_third)  # f32[B,3]
    loss = cross_entropy(third, target)  # f32[]
    objective(loss)  # third.loss
    grad_relu2_at_third = gradient(loss, relu2_at_third)  # f32[B,8]
    # ---- module 1: relu2
    grad_relu2_at_third_at_relu2 = stop_gradient(grad_relu2_at_third)  # f32[B,8]
    target_1 = sub(relu2_at_relu2, grad_relu2_at_third_at_relu2, alpha=0.3277)  # f32[B,8]
    target_1_at_relu2 = stop_gradient(target_1)  # f32[B,8]
    distance = squared_distance(relu2, target_1_at_relu2, 0)  # f32[]
    objective(distance)  # relu2.target
    # ---- auxiliary: relu2.inverse
    target_1_at_relu2_inverse = stop_gradient(target_1)  # f32[B,8]
    aux_relu2_inverse_1 = self.aux.relu2_inverse(target_1_at_relu2_inverse)  # f32[B,8]
    # ---- module 0: relu1
    aux_relu2_inverse_1_at_relu1 = stop_gradient(aux_relu2_inverse_1)  # f32[B,8]
    distance_1 = squared_distance(relu1, aux_relu2_inverse_1_at_relu1, 0)  # f32[]
    objective(distance_1)  # relu1.target
    return third
"""


@pytest.fixture(autouse=True)
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_noise(h: Tensor, sigma: float) -> Tensor:
        return h + sigma * torch.ones_like(h)

    monkeypatch.setattr(noise, "with_noise", with_noise)


def test_the_printed_program() -> None:
    assert str(compiled(mlp(), "tp", ["relu1", "relu2"], order="batch", eta=ETA).ir) == AFTER


def test_a_step_equals_the_formulas_with_two_readers() -> None:
    """`inp` is read by the last module and by `blocks.0`: its target is the mean of what they propose."""
    model = Residual(blocks=2).double()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, "tp", ["inp", "blocks.0"], optimizer=sgd(1.0), eta=ETA)
    before, g = copy.deepcopy(model), copy.deepcopy(program.root.aux["blocks_0_inverse"])
    h = before.inp(x)
    block = before.blocks[0](h.detach())
    leaves = [v.detach().requires_grad_() for v in (h, block)]
    state = leaves[0] + leaves[1]
    loss = nn.functional.cross_entropy(before.out(state + before.blocks[1](state) + leaves[0]), y)
    to_inp, to_block = torch.autograd.grad(loss, leaves, retain_graph=True)
    block_target = block.detach() - ETA * to_block
    with torch.no_grad():
        inp_target = (h - ETA * to_inp + g(block_target)) / 2
        noisy = h + SIGMA
        above = before.blocks[0](noisy)
    reconstruction = ((g(above) - noisy) ** 2).sum(1).mean()
    distances = ((h - inp_target) ** 2).sum(1).mean() + ((block - block_target) ** 2).sum(1).mean()
    (loss + distances + reconstruction).backward()
    report = program.step(x, y)
    assert abs(float(report.objectives["blocks.0.inverse.reconstruction"] - reconstruction.detach())) < 1e-10
    after = [*model.parameters(), *program.root.aux.parameters()]
    for p, q in zip(after, [*before.parameters(), *g.parameters()], strict=True):
        assert q.grad is not None
        assert torch.allclose(q - p, q.grad, rtol=0, atol=1e-10)


def test_a_target_differs_from_the_output_even_where_nothing_is_to_change() -> None:
    """The pitfall that `dtp` corrects: with a zero gradient at the top, `tp` still moves the first module."""
    moved = {}
    for method in ("tp", "dtp"):
        torch.manual_seed(0)
        model = mlp()
        before = snapshot(model)
        program = compiled(model, method, ["relu1", "relu2"], loss=lambda output, target: 0.0 * output.sum())
        program.phase = "forward"
        program.step(*batch())
        moved[method] = not torch.equal(before["first.weight"], model.first.weight)
    assert moved == {"tp": True, "dtp": False}
