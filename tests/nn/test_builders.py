import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locc.nn as aux
from locc.errors import MethodError
from locc.ir.spec import BatchDim
from locc.nn.bridges import CODE_VARIANCE
from nn.specs import BOUNDARIES, B, spec, value

D = torch.float64
PAIRS = list(itertools.product(BOUNDARIES, BOUNDARIES))
BRIDGES = (aux.build_bridge, aux.build_label_encoder, aux.build_label_decoder)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_from_any_layout_to_any(a, b):
    """Inverses in [-1, 1]; bridges, label networks and decoders in the unit interval."""
    (s, hint), (t, other) = BOUNDARIES[a], BOUNDARIES[b]
    ends = {"from_layout": hint, "to_layout": other}
    inside = [build(s, t, **ends) for build in BRIDGES]
    inside.append(aux.build_decoder(s, t, layout=hint, image_layout=other))
    for batch in (2, 5):
        y = aux.build_inverse(s, t, **ends)(value(s, batch))
        assert y.shape == t.concrete(batch)
        assert 0 < y.abs().max() <= 1
        for net in inside:
            y = net(value(s, batch).sigmoid())  # codes lie there too
            assert y.shape == t.concrete(batch)
            assert 0 < y.min() <= y.max() < 1


def unit(matrix):
    torch.testing.assert_close(torch.linalg.svdvals(matrix), torch.ones(min(matrix.shape), dtype=D))


@pytest.mark.parametrize(("n", "m"), [(8, 8), (8, 5), (5, 8)])
def test_flat_inverses_start_with_unit_singular_values(n, m):
    g = aux.build_inverse(spec(B, n), spec(B, m))
    unit(g.map.linear.weight)
    assert g.map.linear.bias.abs().max() == 0
    h = value(spec(B, n))
    torch.testing.assert_close(g(h), torch.tanh(h @ g.map.linear.weight.T), atol=1e-12, rtol=0)
    if n == m:
        w = g.map.linear.weight
        torch.testing.assert_close(w.T @ w, torch.eye(n, dtype=D), atol=1e-10, rtol=0)


def test_inverses_of_maps_and_sequences_are_isometries_at_the_start():
    g = aux.build_inverse(spec(B, 6, 4, 4), spec(B, 6, 4, 4), "linear")
    x = value(spec(B, 6, 4, 4))
    torch.testing.assert_close(g(x).norm(), x.norm(), atol=1e-10, rtol=0)
    up = aux.build_inverse(spec(B, 6, 4, 4), spec(B, 3, 8, 8), "linear")
    assert isinstance(up.map.conv, nn.ConvTranspose2d)
    torch.testing.assert_close(up(x).norm(), x.norm(), atol=1e-10, rtol=0)
    tokens = aux.build_inverse(spec(B, 6, 8), spec(B, 6, 8), "linear")
    x = value(spec(B, 6, 8))
    torch.testing.assert_close(tokens(x).norm(dim=2), x.norm(dim=2), atol=1e-10, rtol=0)
    assert tokens(torch.randn(2, 9, 8, dtype=D)).shape == (2, 9, 8)


def test_patch_tokens_go_back_to_their_patches():
    g = aux.build_inverse(spec(B, 17, 8), spec(B, 3, 16, 16), "linear")
    x = value(spec(B, 17, 8), 1).requires_grad_()
    (grad,) = torch.autograd.grad(g(x)[0, :, 0:4, 4:8].sum(), x)
    assert grad[0].abs().sum(1).nonzero().flatten().tolist() == [2]


def test_inverse_errors():
    with pytest.raises(MethodError, match="i64"):
        aux.build_inverse(spec(B, 8), spec(B, 8, dtype=torch.int64))
    with pytest.raises(MethodError, match="raise max_weights"):
        aux.build_inverse(spec(B, 100), spec(B, 3, 8, 8), max_weights=1000)
    with pytest.raises(MethodError, match="nearest: 'tanh'"):
        aux.build_inverse(spec(B, 8), spec(B, 8), "tan")
    with pytest.raises(MethodError, match="rows a sample"):
        aux.build_inverse(spec(BatchDim(6), 8), spec(B, 8))
    assert aux.build_inverse(spec(B, 8), spec(B, 8), torch.nn.GELU())(value(spec(B, 8))).shape == (3, 8)


@pytest.mark.parametrize("name", BOUNDARIES)
@pytest.mark.parametrize("classes", [None, 5])
def test_a_synthesiser_starts_at_zero_and_keeps_the_shape(name, classes):
    s, hint = BOUNDARIES[name]
    net = aux.build_synthesiser(s, classes, width=16, layout=hint)
    for batch in (2, 5):
        labels = () if classes is None else (torch.arange(batch) % 5,)
        out = net(value(s, batch), *labels)
        assert out.shape == s.concrete(batch)
        assert out.abs().max() == 0
    assert net.last.weight.abs().max() == 0
    assert net.last.bias.abs().max() == 0


def test_synthesiser_widths_and_layers():
    flat = aux.build_synthesiser(spec(B, 12))
    assert flat.first.weight.shape == (1024, 12)
    conv = aux.build_synthesiser(spec(B, 8, 6, 6))
    assert conv.first.weight.shape == (128, 8, 5, 5)
    assert conv.last.weight.shape == (8, 128, 5, 5)
    assert [type(m) for m in conv.hidden] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert any(isinstance(m, nn.LayerNorm) for m in aux.build_synthesiser(spec(B, 6, 8)).modules())


def test_the_label_context_is_a_linear_map_after_the_first_layer():
    s = spec(B, 8, 6, 6)
    net, h, y = aux.build_synthesiser(s, 5, width=16).eval(), value(s), torch.tensor([1, 4, 0])
    nn.init.normal_(net.last.weight)
    hot = aux.one_hot(y, 5, dtype=D)
    torch.testing.assert_close(net(h, y), net(h, hot), atol=1e-12, rtol=0)
    a = net.first(h) + (hot @ net.context.weight.T)[:, :, None, None]
    torch.testing.assert_close(net(h, y), net.last(net.hidden(a)), atol=1e-12, rtol=0)
    pixels = torch.randint(5, (3, 6, 6))
    dense = aux.one_hot(pixels, 5, dtype=D)
    torch.testing.assert_close(net(h, pixels), net(h, dense), atol=1e-12, rtol=0)
    assert net(h, torch.randint(5, (3, 12, 12))).shape == h.shape
    with pytest.raises(MethodError, match="with a label context"):
        net(h)
    with pytest.raises(MethodError, match="without a label context"):
        aux.build_synthesiser(s)(h, y)


@pytest.mark.parametrize("time_first", [False, True])
def test_token_labels_enter_at_their_position(time_first):
    s, out = (spec(6, B, 8), spec(6, B, 11)) if time_first else (spec(B, 6, 8), spec(B, 6, 11))
    net, h = aux.build_synthesiser(s, out, width=16), value(s)
    nn.init.normal_(net.last.weight)
    ids = torch.randint(11, h.shape[:2])
    hot = aux.one_hot(ids, 11, dtype=D)
    torch.testing.assert_close(net(h, ids), net(h, hot), atol=1e-12, rtol=0)
    other = ids.clone()
    where = (2, 1) if time_first else (1, 2)
    other[where] = -100
    changed = (net(h, other) - net(h, ids)).abs().sum(2).nonzero().tolist()
    assert changed == [list(where)]
    hot[where] = 0
    torch.testing.assert_close(net(h, other), net(h, hot), atol=1e-12, rtol=0)


def test_the_bridge_is_two_dense_layers():
    net, s = aux.build_bridge(spec(B, 8, 4, 4), spec(B, 10)), value(spec(B, 8, 4, 4))
    first, second = net.net[0].linear, net.net[2].linear
    assert first.weight.shape == (50, 128)
    assert second.weight.shape == (10, 50)
    expected = torch.sigmoid(second(torch.sigmoid(first(s.movedim(1, -1).flatten(1)))))
    torch.testing.assert_close(net(s), expected, atol=1e-12, rtol=0)
    assert abs(first.weight.std().item() - (2 / 128) ** 0.5) < 0.01
    assert first.bias.abs().max() == 0
    with pytest.raises(MethodError, match="raise max_weights"):
        aux.build_bridge(spec(B, 64, 32, 32), spec(B, 10), max_weights=10_000)


@pytest.mark.parametrize("classes", [10, 1000])
def test_codes_of_classes_differ_alike_whatever_their_depth_and_number(classes):
    code, width = torch.eye(classes, dtype=torch.float64), 256
    for depth in range(4):
        encode = aux.build_label_encoder(
            spec(B, classes if depth == 0 else width), spec(B, width), one_hot=depth == 0
        )
        code = encode(code)
        assert abs(code.var(0).mean().item() - CODE_VARIANCE) < 0.008
        assert abs(code.mean().item() - 0.5) < 0.02


def weights(net):
    return sum(p.numel() for p in net.parameters())


BIG = {
    "map to map": (spec(B, 64, 56, 56), spec(B, 512, 7, 7)),
    "map to vector": (spec(B, 64, 56, 56), spec(B, 512)),
    "vector to map": (spec(B, 1000), spec(B, 64, 56, 56)),
    "tokens to fewer": (spec(B, 3136, 96), spec(B, 784, 192)),
    "tokens to more": (spec(B, 784, 192), spec(B, 3136, 96)),
    "map to tokens": (spec(B, 64, 56, 56), spec(B, 197, 192)),
    "vector to tokens": (spec(B, 1000), spec(B, 3137, 96)),
}


@pytest.mark.parametrize("name", BIG)
def test_maps_of_real_networks_need_few_weights(name):
    s, t = (spec(*x.shape, dtype=torch.float32) for x in BIG[name])
    for build in (aux.build_bridge, aux.build_label_encoder, aux.build_inverse):
        net = build(s, t, device="meta")
        assert weights(net) < 25e6
        x = torch.empty(s.concrete(2), device="meta")
        assert net(x).shape == t.concrete(2)


def test_tokens_are_mixed_by_one_matrix_and_channels_by_another():
    g = aux.build_inverse(spec(B, 5, 6), spec(B, 9, 8), "linear")
    x, t = value(spec(B, 5, 6)), g.map
    expected = torch.einsum("st,btd,ed->bse", t.mix.weight, x, t.linear.weight)
    torch.testing.assert_close(g(x), expected, atol=1e-12, rtol=0)
    unit(torch.kron(t.mix.weight, t.linear.weight))


def test_a_code_of_the_sample_reaches_every_position_of_a_map_from_every_other():
    net, x = aux.build_bridge(spec(B, 3, 9, 9), spec(B, 4, 5, 5), expansion=1), value(spec(B, 3, 9, 9), 1)
    (grad,) = torch.autograd.grad(net(x.requires_grad_())[0, 0, 0, 0], x)
    assert grad.ne(0).all()
    tokens = aux.build_bridge(spec(B, 6, 8), spec(B, 6, 4), per_position=True)
    x = value(spec(B, 6, 8), 1).requires_grad_()
    (grad,) = torch.autograd.grad(tokens(x)[0, 2].sum(), x)
    assert grad.abs().sum(2).nonzero().tolist() == [[0, 2]]


def test_the_infopro_decoder_is_that_of_the_paper():
    s, image = spec(B, 8, 4, 4), spec(B, 3, 16, 16)
    net, h = aux.build_decoder(s, image).eval(), value(s)
    conv, bn, _, last, _ = net.net
    assert conv.weight.shape == (12, 8, 3, 3)
    assert last.weight.shape == (3, 12, 3, 3)
    up = F.interpolate(h, size=(16, 16), mode="bilinear", align_corners=True)
    torch.testing.assert_close(net(h), torch.sigmoid(last(F.relu(bn(conv(up))))), atol=1e-12, rtol=0)
    with pytest.raises(MethodError, match="i64"):
        aux.build_decoder(s, spec(B, 16, dtype=torch.int64))


FACTORIES: list[aux.Factory] = [
    aux.build_head,
    aux.build_pred_head,
    aux.build_sim_head,
    aux.build_inverse,
    aux.build_bridge,
    aux.build_label_encoder,
    aux.build_label_decoder,
    aux.build_decoder,
    aux.build_synthesiser,
    aux.BroadcastFeedback,
]


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_every_builder_is_a_factory(factory):
    s, out = spec(B, 12, dtype=torch.float32), spec(B, 5, dtype=torch.float32)
    torch.manual_seed(0)
    one = factory(s, out).state_dict()
    torch.manual_seed(0)
    two = factory(s, out).state_dict()
    assert one
    assert all(torch.equal(one[k], two[k]) and two[k].dtype in (torch.float32, torch.int64) for k in one)
    assert all(t.is_meta for t in factory(s, out, device="meta").state_dict().values())


@pytest.mark.parametrize("name", ["flat", "class token", "time first", "channels last"])
def test_networks_compile_and_export_with_a_dynamic_batch(name):
    s, hint = BOUNDARIES[name]
    image = spec(B, 3, 12, 12)
    nets = [
        aux.build_inverse(s, s, from_layout=hint, to_layout=hint),
        aux.build_synthesiser(s, width=8),
        aux.build_decoder(s, image),
        aux.build_bridge(s, spec(B, 4)),
        aux.build_sim_head(s),
        aux.BroadcastFeedback(spec(B, 4), spec(B, 3)) if name == "flat" else aux.build_head(s, spec(B, 4)),
    ]
    dim = 1 if name == "time first" else 0
    for net in nets:
        is_feedback = isinstance(net, aux.BroadcastFeedback)
        h, wide = (value(spec(B, 3) if is_feedback else s, n) for n in (4, 7))
        net.eval()
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(h), net(h))
        dynamic = ({dim: torch.export.Dim("batch", min=2)},)
        exported = torch.export.export(net, (h,), dynamic_shapes=dynamic).module()
        torch.testing.assert_close(exported(wide), net(wide))


class WithoutACpuKernel(nn.Linear):
    """As half precision is, of some layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            raise NotImplementedError("\"layer\" not implemented for 'Half'")
        return super().forward(x)


def test_what_has_no_kernel_on_the_cpu_is_judged_by_its_shapes() -> None:
    aux.check_shapes(WithoutACpuKernel(4, 3, dtype=D), (spec(B, 4),), spec(B, 3), "my head")
    with pytest.raises(MethodError, match=r"my head for .* gives shape"):
        aux.check_shapes(WithoutACpuKernel(4, 3, dtype=D), (spec(B, 4),), spec(B, 5), "my head")


def test_a_wrong_result_is_named():
    with pytest.raises(MethodError, match=r"my head for f64\[B,4\] gives shape \(2, 3\)"):
        aux.check_shapes(nn.Linear(4, 3, dtype=D), (spec(B, 4),), spec(B, 5), "my head")
    with pytest.raises(MethodError, match=r"my head cannot serve f64\[B,4\]"):
        aux.check_shapes(nn.Linear(6, 3, dtype=D), (spec(B, 4),), spec(B, 3), "my head")
    net = nn.BatchNorm1d(4, dtype=D)
    aux.check_shapes(net, (spec(B, 4),), spec(B, 4), "my norm")
    assert net.num_batches_tracked == 0
