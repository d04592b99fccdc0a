import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locc.errors import MethodError
from locc.ir.spec import BatchDim, TensorSpec
from locc.nn import Layout, build_head, build_pred_head, one_hot, plan_readout
from locc.nn.layout import pool_kernel
from nn.specs import BOUNDARIES, OUTPUTS, B, spec, value

KINDS = ["linear", "mlp", "mlp-sr", "cnn", "fixed", "pred"]


def build(kind, s, output, **options):
    return build_pred_head(s, output, **options) if kind == "pred" else build_head(s, output, kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "output"), list(itertools.product(BOUNDARIES, OUTPUTS)))
def test_a_head_has_the_shape_of_the_output(kind, name, output):
    s, hint = BOUNDARIES[name]
    out = OUTPUTS[output]
    head = build(kind, s, out, layout=hint)
    for batch in (2, 5):
        h = value(s, batch).requires_grad_()
        y = head(h)
        assert y.shape == out.concrete(batch)
        assert y.dtype == torch.float64
        (g,) = torch.autograd.grad(y.square().sum(), h)
        assert kind == "pred" or g.abs().sum() > 0


def test_linear_head_is_pool_and_linear():
    s = spec(B, 6, 6, 8)
    head, h = build_head(s, spec(B, 5)), value(s)
    expected = F.linear(h.mean((1, 2)), head.linear.weight, head.linear.bias)
    torch.testing.assert_close(head(h), expected, atol=1e-12, rtol=0)
    s = spec(B, 17, 8)
    head, h = build_head(s, spec(B, 5)), value(s)
    torch.testing.assert_close(head(h), head.linear(h[:, 0]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_head_sees_one_token(kind):
    s, out = spec(B, 6, 8), spec(B, 6, 11)
    head, h = build(kind, s, out), value(s)
    for p in head.parameters():
        nn.init.normal_(p)
    other = h.clone()
    other[:, 3:] = 0
    torch.testing.assert_close(head(h)[:, :3], head(other)[:, :3], atol=1e-12, rtol=0)


def test_token_heads_take_other_lengths_and_output_forms():
    s, h = spec(B, 6, 8), value(spec(B, 6, 8))
    head = build_head(s, spec(B, 6, 11))
    assert head(torch.randn(2, 9, 8, dtype=torch.float64)).shape == (2, 9, 11)
    folded = build_head(s, spec(BatchDim(6), 11))
    folded.load_state_dict(head.state_dict())
    assert torch.equal(folded(h), head(h).reshape(18, 11))
    swapped = build_head(s, spec(B, 11, 6))
    swapped.load_state_dict(head.state_dict())
    assert torch.equal(swapped(h), head(h).transpose(1, 2))
    early = build_head(spec(6, B, 8), spec(BatchDim(6), 11))
    early.load_state_dict(head.state_dict())
    assert torch.equal(early(h.transpose(0, 1)), head(h).transpose(0, 1).reshape(18, 11))
    rows = build_head(spec(BatchDim(6), 8), spec(B, 6, 11))
    rows.load_state_dict(head.state_dict())
    torch.testing.assert_close(rows(h.reshape(18, 8)), head(h), atol=1e-12, rtol=0)
    sample = build_head(spec(BatchDim(6), 8), spec(B, 11))
    assert sample(h.reshape(18, 8)).shape == (3, 11)
    for kind in KINDS:
        assert build(kind, spec(BatchDim(6), 8), spec(BatchDim(6), 11))(h.reshape(18, 8)).shape == (18, 11)
        assert build(kind, spec(BatchDim(6), 8), spec(B, 11))(h.reshape(18, 8)).shape == (3, 11)


def test_a_token_output_leaves_the_class_token_out():
    s = spec(B, 17, 8)
    head, h = build_head(s, spec(B, 16, 5)), value(s)
    torch.testing.assert_close(head(h), head.linear(h[:, 1:]), atol=1e-12, rtol=0)
    dense = build_head(s, spec(B, 5, 4, 4))
    expected = dense.linear(h[:, 1:]).reshape(3, 4, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(dense(h), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "s", [spec(B, 8, 4), TensorSpec((BatchDim(4), 8), torch.float64)], ids=["length", "rows"]
)
def test_the_readout_undoes_itself(s):
    for out in (spec(BatchDim(4), 7), spec(B, 4, 7)):
        hint = "channels_first" if len(s.shape) == 3 else None
        plan = plan_readout(s, out, hint)
        e = value(out)
        rows = plan.rows_of(e)
        assert torch.equal(plan.write(rows), e)


def test_mlp_sr_is_the_net_of_the_paper():
    head = build_head(spec(B, 8, 10, 10), spec(B, 5), "mlp-sr")
    kinds = [type(m).__name__ for m in head.spatial] + [type(m).__name__ for m in head.dense]
    block, dense = ["Conv2d", "BatchNorm2d", "ReLU"], ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds == ["_Quarter", *block * 3, "AdaptiveAvgPool2d", "Flatten", *dense * 3, "Linear"]
    assert head.spatial[0](torch.zeros(2, 8, 10, 9)).shape == (2, 8, 3, 3)
    assert head.spatial[1].weight.shape == (8, 8, 1, 1)
    assert head.spatial[1].bias is None
    assert head.dense[0].weight.shape == (32, 32)
    big = build_head(spec(B, 64, 8, 8, dtype=torch.float32), spec(B, 10), "mlp-sr")
    assert abs(big.dense[0].weight.std().item() - 0.01) < 1e-3
    assert abs(big.spatial[1].weight.std().item() - (2 / 64) ** 0.5) < 0.01


def layers(head):
    return [str(m).partition(", b")[0] for m in head.modules() if not list(m.children())]


def test_the_hidden_layers_of_mlp_sr_are_bounded():
    def widths(channels, **options):
        head = build_head(spec(B, channels, 7, 7), spec(B, 1000), "mlp-sr", device="meta", **options)
        return [
            (layer.in_features, layer.out_features) for layer in head.dense if isinstance(layer, nn.Linear)
        ]

    assert widths(512) == [(2048, 2048)] * 3 + [(2048, 1000)]
    assert widths(2048) == [(8192, 2048), *[(2048, 2048)] * 2, (2048, 1000)]
    assert widths(8, hidden=16) == [(32, 16), (16, 16), (16, 16), (16, 1000)]


@pytest.mark.parametrize("kind", ["linear", "mlp", "mlp-sr", "cnn", "pred", "cascade", "infopro"])
def test_a_rank_factors_the_last_layer(kind):
    head = build(kind, spec(B, 6, 4, 4), spec(B, 50), rank=3)
    *_, first, last = (m for m in head.modules() if isinstance(m, nn.Linear))
    assert (first.out_features, last.in_features, last.out_features) == (3, 3, 50)
    assert first.bias is None
    assert first.weight.std() > 0.5 * (3 * first.in_features) ** -0.5  # of U(+-1/sqrt(n)), not N(0, 0.01^2)


def test_the_other_heads_of_dgl():
    """MLP-SR without its convolutions, and two 3x3 convolutions of the boundary's size and channels."""
    s, out = spec(B, 4, 9, 8), spec(B, 5)
    mlp, cnn, h = build_head(s, out, "mlp"), build_head(s, out, "cnn"), value(s)
    linear, norm = "Linear(in_features=16, out_features=16", "BatchNorm1d(16, eps=1e-05, momentum=0.1"
    last = "Linear(in_features=16, out_features=5"
    kinds = [*[linear, norm, "ReLU()"] * 3, last]
    assert [name.partition(", affine")[0] for name in layers(mlp)[3:]] == kinds
    small = F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(h, (3, 2)), 2).flatten(1)
    torch.testing.assert_close(mlp(h), mlp.dense(small), atol=1e-12, rtol=0)
    first, norm1, _, second, norm2, *_, norm3, _, linear = cnn.net
    x = norm2(F.conv2d(norm1(F.conv2d(h, first.weight, padding=1)).relu(), second.weight, padding=1)).relu()
    torch.testing.assert_close(
        cnn(h), linear(norm3(F.adaptive_avg_pool2d(x, 2)).flatten(1)), atol=1e-12, rtol=0
    )
    assert first.weight.shape == second.weight.shape == (4, 4, 3, 3)
    assert first.bias is second.bias is None


def test_the_fixed_head_trains_nothing():
    head = build_head(spec(B, 16), spec(B, 5), "fixed")
    assert list(head.parameters()) == []
    assert list(head.state_dict()) == ["weight"]
    assert head.weight.abs().max() <= 0.25


def test_pool_kernel_doubles_in_turn():
    assert pool_kernel(128, (32, 32), 4096) == (8, 4)
    assert pool_kernel(128, (32, 32), 2048) == (8, 8)
    assert pool_kernel(64, (8, 8), 4096) == (1, 1)
    assert pool_kernel(10, (2, 64), 40) == (2, 16)
    assert pool_kernel(5000, (3, 3), 4096) == (4, 4)


def test_pred_head_pools_then_maps_by_zero():
    s = spec(B, 128, 32, 32)
    head, h = build_pred_head(s, spec(B, 10)), value(s)
    assert head.linear.weight.shape == (10, 4096)
    assert head.linear.weight.abs().max() == 0
    assert torch.equal(head(h), head.linear.bias.expand(3, 10))
    nn.init.normal_(head.linear.weight)
    expected = head.linear(F.avg_pool2d(h, (8, 4)).flatten(1))
    torch.testing.assert_close(head(h), expected, atol=1e-10, rtol=0)


def test_ragged_pooling_means_over_what_it_covers():
    s = spec(B, 8, 5, 7)
    head = build_pred_head(s, spec(B, 10), dim_in_decoder=64)
    assert head.pool.pool.kernel_size == (4, 2)
    assert torch.equal(head.pool(torch.ones(1, 8, 5, 7)), torch.ones(1, 64))


def test_errors():
    s = spec(B, 8)
    with pytest.raises(MethodError, match="nearest: 'linear'"):
        build_head(s, spec(B, 5), "linea")
    with pytest.raises(MethodError, match="cannot imitate"):
        build_head(s, spec(B, 5, dtype=torch.int64))
    with pytest.raises(MethodError, match=r"f64\[3,5\]"):
        build_head(s, spec(3, 5))
    with pytest.raises(MethodError, match="has 2 rows a sample"):
        build_head(spec(B, 3, 8), spec(BatchDim(2), 5))
    with pytest.raises(MethodError, match="rows a sample"):
        build_head(spec(BatchDim(3), 4, 8), spec(B, 5))
    with pytest.raises(MethodError, match="max_weights"):
        build_head(spec(B, 4096, dtype=torch.float32), spec(B, 512, 50000))
    with pytest.raises(MethodError, match="i64"):
        build_head(spec(B, 6, dtype=torch.int64), spec(B, 6, 11))


@pytest.mark.parametrize("kind", KINDS)
def test_seed_device_and_dtype(kind):
    s, out = spec(B, 8, 4, 4), spec(B, 5)
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(build(kind, s, out, dtype=torch.float32))
    one, two = (n.state_dict() for n in nets)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert all(t.dtype in (torch.float32, torch.int64) for t in one.values())
    assert all(t.is_meta for t in build(kind, s, out, device="meta").state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_heads_compile_and_export(kind):
    s, out = spec(B, 8, 6, 6, dtype=torch.float32), spec(B, 5)
    head = build(kind, s, out, layout=Layout.image()).eval()
    h = value(s, 4)
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(h), head(h))
    exported = torch.export.export(head, (h,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(value(s, 7)).shape, (7, 5))


def test_one_hot():
    y = torch.tensor([[2, 0], [-100, 1]])
    expected = torch.tensor([[[0, 0, 1], [1, 0, 0]], [[0, 0, 0], [0, 1, 0]]]).double()
    assert torch.equal(one_hot(y, 3, dtype=torch.float64), expected)
    assert one_hot(y, 3).dtype == torch.float32
    assert torch.equal(one_hot(y, 3, ignore_index=0)[0, 1], torch.zeros(3))
    soft = torch.rand(4, 3)
    assert one_hot(soft, 3) is soft
    with pytest.raises(MethodError, match="neither class ids"):
        one_hot(soft, 5)
