"""`tp`: targets are the inverses themselves, without the difference correction.

No code of Bengio 2014 is public; losses and order are those of `dtp` (see test_dtp.py). Ours alone is that a
value with several readers has the mean of the targets that they propose.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from locc.rewrite import noise
from support import Residual, batch, compiled, mlp, sgd, snapshot

ETA = 0.3277
SIGMA = 0.3598


@pytest.fixture(autouse=True)
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_noise(h: Tensor, sigma: float) -> Tensor:
        return h + sigma * torch.ones_like(h)

    monkeypatch.setattr(noise, "with_noise", with_noise)


def test_a_step_equals_the_formulas_with_two_readers() -> None:
    """`inp` is read by the last module and by `blocks.0`: its target is the mean of what they propose."""
    model = Residual(blocks=2).double()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, "tp", ["inp", "blocks.0"], optimizer=sgd(1.0), eta=ETA, order="batch")
    assert program.phases == ()
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
