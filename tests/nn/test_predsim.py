import numpy as np
import pytest
import torch

from locc.nn import build_sim_head, one_hot, sim_loss, similarity_matrix
from nn.specs import BOUNDARIES, value


def oracle(v: np.ndarray) -> np.ndarray:
    """S(v), sample by sample, from its definition."""
    rows = []
    for sample in v:
        f = sample.reshape(sample.shape[0], -1)
        f = f.std(axis=1, ddof=1) if sample.ndim > 1 and f.shape[0] > 3 and f.shape[1] > 1 else f.ravel()
        f = f - f.mean()
        rows.append(f / max(np.sqrt((f * f).sum()), 1e-8))
    return np.clip([[float(a @ b) for a in rows] for b in rows], -1, 1)


@pytest.mark.parametrize(
    "shape", [(6, 9), (6, 5, 4), (6, 5, 4, 3), (6, 3, 4, 3), (6, 5, 1, 1), (6, 4, 2, 3, 2)]
)
def test_similarity_matrix_is_its_definition(shape):
    v = torch.randn(shape, dtype=torch.float64)
    np.testing.assert_allclose(similarity_matrix(v).numpy(), oracle(v.numpy()), atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(6, 9), (6, 5, 4, 3), (6, 2, 4, 3)])
def test_similarity_is_invariant_to_affine_rescaling_of_samples(shape):
    v = torch.randn(shape, dtype=torch.float64)
    per_sample = (6, *[1] * (len(shape) - 1))
    a, b = torch.rand(per_sample, dtype=torch.float64) + 0.1, torch.randn(per_sample, dtype=torch.float64)
    torch.testing.assert_close(similarity_matrix(a * v + b), similarity_matrix(v), atol=1e-10, rtol=0)


def test_sim_loss_is_the_mean_square_over_all_entries():
    z, y = torch.randn(6, 5, 4, 3, dtype=torch.float64), one_hot(torch.tensor([0, 1, 1, 2, 0, 3]), 4)
    expected = np.mean((oracle(z.numpy()) - oracle(y.double().numpy())) ** 2)
    np.testing.assert_allclose(sim_loss(z, y).item(), expected, atol=1e-10, rtol=0)


def test_sim_loss_of_tokens_leaves_ignored_ones_out():
    z, ids = torch.randn(2, 8, 5, dtype=torch.float64), torch.tensor([[0, 1, -100, 3, 1], [2, -100, 0, 0, 1]])
    rows, keep = z.movedim(1, -1).reshape(10, 8), (ids != -100).flatten()
    expected = sim_loss(rows[keep], one_hot(ids.flatten()[keep], 4))
    torch.testing.assert_close(sim_loss(z, one_hot(ids, 4)), expected, atol=1e-10, rtol=0)
    assert sim_loss(z, torch.zeros(2, 5, 4)) == 0


def test_features_that_are_not_finite_have_no_finite_loss():
    z, y = torch.randn(4, 5), torch.eye(4)
    z[1] = torch.nan
    assert sim_loss(z, y).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, 300.0])
@pytest.mark.parametrize("shape", [(4, 7), (4, 7, 3, 3)])
def test_equal_features_have_no_gradient_and_leave_the_others_theirs(shape, level, dtype):
    z = torch.randn(shape, dtype=dtype)
    z[1] = level
    z.requires_grad_()
    y = one_hot(torch.tensor([0, 1, 1, 2]), 3)
    sim_loss(z, y).backward()
    assert z.grad[1].abs().max() == 0
    assert 0 < z.grad.abs().max() < 1
    kept = z.detach()[[0, 2, 3]].requires_grad_()
    (sim_loss(kept, y[[0, 2, 3]]) * 9 / 16).backward()
    torch.testing.assert_close(z.grad[[0, 2, 3]], kept.grad)


def test_no_gradient_reaches_the_labels():
    y = torch.rand(4, 3, requires_grad=True)
    z = torch.randn(4, 6, requires_grad=True)
    sim_loss(z, y).backward()
    assert y.grad is None
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("name", BOUNDARIES)
def test_the_sim_head_keeps_the_shape(name):
    s, hint = BOUNDARIES[name]
    head = build_sim_head(s, layout=hint)
    h = value(s, 4)
    z = head(h)
    assert z.shape == head.layout.first(h).shape
    assert [n for n, _ in head.named_parameters()] == ["map.weight"]
    assert similarity_matrix(z).shape == (4, 4)
    assert head(value(s, 7)).shape[0] == 7
