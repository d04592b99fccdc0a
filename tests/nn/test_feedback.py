import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locc.errors import MethodError
from locc.ir.spec import BatchDim
from locc.nn import (
    BroadcastFeedback,
    broadcast_feedback,
    draw_feedback,
    feedback_call,
    feedback_conv,
    feedback_linear,
)
from nn.specs import BOUNDARIES, OUTPUTS, B, spec, value

D = torch.float64
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1": (lambda: nn.Conv1d(4, 6, 3, padding=1), (3, 4, 9)),
    "conv2": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (3, 4, 9, 9)),
    "conv2 same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (3, 4, 9, 9)),
    "conv2 reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 9, 9)),
    "conv3": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4)),
    "transposed1": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (3, 4, 5)),
    "transposed2": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (3, 4, 5, 5)),
    "transposed3": (lambda: nn.ConvTranspose3d(2, 3, 2), (3, 2, 4, 4, 4)),
}


def gradients(y, tensors):
    torch.manual_seed(1)
    return torch.autograd.grad(y, tensors, torch.randn_like(y))


@pytest.mark.parametrize("name", LAYERS)
def test_with_the_weight_for_feedback_it_is_backpropagation(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=D, requires_grad=True)
    wrt = [x, *layer.parameters()]
    y = feedback_call(layer, x, layer.weight)
    assert torch.equal(y, layer(x))
    for got, expected in zip(gradients(y, wrt), gradients(layer(x), wrt), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_input_gradient_runs_through_the_feedback(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=D, requires_grad=True)
    feedback = draw_feedback(layer.weight)
    back = make().double()
    back.load_state_dict({**layer.state_dict(), "weight": feedback})
    y = feedback_call(layer, x, feedback)
    assert torch.equal(y, layer(x))
    got, (expected, *_) = gradients(y, [x, *layer.parameters()]), gradients(back(x), [x])
    torch.testing.assert_close(got[0], expected, atol=1e-10, rtol=0)
    exact = gradients(layer(x), list(layer.parameters()))
    for g, e in zip(got[1:], exact, strict=True):
        torch.testing.assert_close(g, e, atol=1e-10, rtol=0)
    assert not torch.allclose(got[0], gradients(layer(x), [x])[0])


def test_a_leaf_input_costs_no_feedback_and_overflow_stays_out():
    w, b = torch.randn(4, 6, requires_grad=True), torch.randn(4)
    x, feedback = torch.randn(3, 6), torch.full((4, 6), 1e38)
    assert "Add" not in type(feedback_linear(x, w, b, feedback).grad_fn).__name__.replace("Addmm", "")
    y = feedback_linear((1e10 * x).requires_grad_(), w, b, feedback)
    assert torch.equal(y, F.linear(1e10 * x, w, b))
    with torch.no_grad():
        assert torch.equal(feedback_linear(x.requires_grad_(), w, b, feedback), F.linear(x, w, b))


def test_under_torch_func():
    w, feedback, x = (torch.randn(s, dtype=D) for s in ((4, 6), (4, 6), (3, 6)))
    gw, gx = torch.func.grad(lambda w, x: feedback_linear(x, w, None, feedback).sum(), argnums=(0, 1))(w, x)
    torch.testing.assert_close(gx, torch.ones(3, 4, dtype=D) @ feedback, atol=1e-10, rtol=0)
    torch.testing.assert_close(gw, torch.ones(4, 3, dtype=D) @ x, atol=1e-10, rtol=0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3), nn.Linear(12, 4)
        self.register_buffer("fa", draw_feedback(self.a.weight))
        self.register_buffer("fb", draw_feedback(self.b.weight))

    def forward(self, x):
        h = torch.tanh(feedback_call(self.a, x, self.fa))
        return feedback_call(self.b, h.flatten(1), self.fb)


def test_it_compiles_and_exports_with_its_backward():
    net, x = Net().double(), torch.randn(3, 2, 4, 4, dtype=D)
    expected = gradients(net(x), list(net.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(net, (x,)).module()
    for other, own in ((compiled, net), (exported, exported)):
        got = gradients(other(x), list(own.parameters()))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, atol=1e-10, rtol=0)


def test_draw_feedback_follows_the_law_of_the_weight():
    w = nn.Conv2d(16, 32, 3).weight
    one, two = (draw_feedback(w, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert not one.requires_grad
    assert one.shape == w.shape
    assert one.abs().max() <= (16 * 9) ** -0.5
    assert one.abs().max() > 0.95 * (16 * 9) ** -0.5
    torch.manual_seed(2)
    a = draw_feedback(w, "xavier_normal")
    torch.manual_seed(2)
    assert torch.equal(a, draw_feedback(w, "xavier_normal"))
    with pytest.raises(MethodError, match="nearest: 'kaiming_normal'"):
        draw_feedback(w, "kaiming_norm")
    with pytest.raises(MethodError, match="no input gradient"):
        draw_feedback(nn.LayerNorm(4).weight)


def test_errors():
    with pytest.raises(MethodError, match="Embedding"):
        feedback_call(nn.Embedding(4, 3), torch.tensor([1]), torch.randn(4, 3))
    with pytest.raises(MethodError, match="shape of its weight"):
        feedback_linear(torch.randn(2, 3), torch.randn(4, 3), None, torch.randn(3, 4))
    with pytest.raises(MethodError, match="not 4"):
        feedback_conv(torch.randn(2, 3), torch.randn(4, 3), None, torch.randn(4, 3), dims=4)
    with pytest.raises(MethodError, match="does not fit"):
        broadcast_feedback(torch.randn(2, 5), torch.randn(7, 5), spec(B, 8))


@pytest.mark.parametrize("name", BOUNDARIES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_broadcast_has_the_shape_of_the_boundary(name, output):
    s, hint = BOUNDARIES[name]
    back = BroadcastFeedback(s, OUTPUTS[output], layout=hint)
    assert list(back.parameters()) == []
    for batch in (2, 5):
        delta = back(value(OUTPUTS[output], batch))
        assert delta.shape == s.concrete(batch)
        assert delta.abs().sum() > 0


def test_the_broadcast_is_its_formula():
    e, t = torch.randn(3, 5, dtype=D), torch.randn(3, 6, 5, dtype=D)
    for s in (spec(B, 12), spec(B, 8, 5, 7)):
        back = BroadcastFeedback(s, spec(B, 5))
        assert back.matrix.shape == (12 if len(s.shape) == 2 else 280, 5)
        assert back.matrix.abs().max() <= back.matrix.shape[0] ** -0.5
    back = BroadcastFeedback(spec(B, 12), spec(B, 5))
    torch.testing.assert_close(back(e), e @ back.matrix.T, atol=1e-12, rtol=0)
    assert torch.equal(back(e), broadcast_feedback(e, back.matrix, spec(B, 12)))
    torch.testing.assert_close(
        BroadcastFeedback.forward(back, e), torch.stack([back.matrix @ row for row in e]), atol=1e-12, rtol=0
    )
    seq = BroadcastFeedback(spec(B, 6, 8), spec(B, 5))
    expected = (e @ seq.matrix.T / 6).unsqueeze(1).expand(3, 6, 8)
    torch.testing.assert_close(seq(e), expected, atol=1e-12, rtol=0)
    token = BroadcastFeedback(spec(B, 6, 8), spec(B, 6, 5))
    torch.testing.assert_close(token(t), t @ token.matrix.T, atol=1e-12, rtol=0)
    folded = BroadcastFeedback(spec(B, 6, 8), spec(BatchDim(6), 5))
    got = folded(t.reshape(18, 5))
    torch.testing.assert_close(got, t @ folded.matrix.T, atol=1e-12, rtol=0)
    rows = BroadcastFeedback(spec(BatchDim(6), 8), spec(B, 6, 5))
    torch.testing.assert_close(rows(t), (t @ rows.matrix.T).reshape(18, 8), atol=1e-12, rtol=0)
    total = BroadcastFeedback(spec(B, 8), spec(B, 6, 5))
    torch.testing.assert_close(total(t), t.sum(1) @ total.matrix.T, atol=1e-12, rtol=0)
    first = BroadcastFeedback(spec(6, B, 8), spec(6, B, 5))
    torch.testing.assert_close(first(t.transpose(0, 1)), (t @ first.matrix.T).transpose(0, 1))
    half = BroadcastFeedback(spec(B, 3, 8), spec(B, 6, 5))
    torch.testing.assert_close(half(t).sum(1), t.sum(1) @ half.matrix.T, atol=1e-12, rtol=0)
    cls = BroadcastFeedback(spec(B, 17, 8), spec(B, 16, 5))
    assert cls(torch.randn(2, 16, 5, dtype=D))[:, 0].abs().max() == 0
