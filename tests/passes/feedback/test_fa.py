"""`fa`: the training graph, the rule by hand, and what it does to networks of all kinds.

The code of Lillicrap et al. is not public; read beside the paper: `Linear:updateGradInput` of
anokland/dfa-torch, e3212a9, Models/Linear.lua, lines 72 to 96, and for convolutions `Conv2dGrad.backward` of
jsalbert/biotorch, 04bca8a, biotorch/autograd/fa/conv.py, lines 24 to 54. Ours departs in the start of B:
drawn by the law of the weights, where theirs (lines 37 to 42) is by default a copy of them.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locc
from locc.errors import MethodError
from support import close
from zoo import find

D = torch.float64


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Linear(7, 4)
    ).to(D)


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    ).to(D)


MODELS = {"mlp": (mlp, (6,), 4), "convnet": (convnet, (2, 8, 8), 5)}


def batch(name, size=5):
    _, shape, classes = MODELS[name]
    return torch.randn(size, *shape, dtype=D), torch.randint(0, classes, (size,))


def sgd(lr=0.1, **options):
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def feedback_of(program):
    return {name: b for name, b in program.root.named_buffers() if name.startswith("aux.")}


def use_weights(program):
    """Set every feedback matrix to the weight it stands for."""
    with torch.no_grad():
        for node in program.ir.graph.nodes:
            if "stands_for" in node.meta:
                layer = program.root.get_submodule(node.meta["stands_for"][1])
                held = str(node.args[2].target).removesuffix(".matrix")
                program.root.get_submodule(held).matrix.copy_(layer.weight)


AFTER = """\
# 3 modules: 1, 4, 5
def step(self, input_1, target):
    # ---- module 0: 1
    layer_0 = self[0](input_1)  # f64[B,8]
    layer_1 = self[1](layer_0)  # f64[B,8]
    # ---- module 1: 4
    aux_feedback_2_matrix = self.aux.feedback_2.matrix  # f64[7,8]
    model_2 = self[2]
    layer_1_at_4 = stop_gradient(layer_1)  # f64[B,8]
    layer_2 = feedback_layer(layer_1_at_4, model_2, aux_feedback_2_matrix)  # f64[B,7]
    layer_3 = self[3](layer_2)  # f64[B,7]
    layer_4 = self[4](layer_3)  # f64[B,7]
    # ---- module 2: 5
    aux_feedback_5_matrix = self.aux.feedback_5.matrix  # f64[4,7]
    model_5 = self[5]
    layer_4_at_5 = stop_gradient(layer_4)  # f64[B,7]
    layer_5 = feedback_layer(layer_4_at_5, model_5, aux_feedback_5_matrix)  # f64[B,4]
    loss = cross_entropy(layer_5, target)  # f64[]
    objective(loss)  # 5.loss
    grad_layer_4_at_5 = gradient(loss, layer_4_at_5)  # f64[B,7]
    # ---- module 1: 4
    grad_layer_4_at_5_at_4 = stop_gradient(grad_layer_4_at_5)  # f64[B,7]
    chain = inner(layer_4, grad_layer_4_at_5_at_4)  # f64[]
    objective(chain)  # 4.chain
    grad_layer_1_at_4 = gradient(chain, layer_1_at_4)  # f64[B,8]
    # ---- module 0: 1
    grad_layer_1_at_4_at_1 = stop_gradient(grad_layer_1_at_4)  # f64[B,8]
    chain_1 = inner(layer_1, grad_layer_1_at_4_at_1)  # f64[]
    objective(chain_1)  # 1.chain
    return layer_5
"""


def test_the_training_graph():
    assert str(locc.compile(mlp(), "fa", ["1", "4"], example_inputs=batch("mlp")[0]).ir) == AFTER


class Backwards(torch.autograd.Function):
    """y = forward(x, w, b), with dx through B: the rule, written once more and independently."""

    @staticmethod
    def forward(ctx, x, w, b, feedback, stride, padding, groups):
        ctx.save_for_backward(x, w, feedback)
        ctx.conv = (stride, padding, groups)
        return F.linear(x, w, b) if w.dim() == 2 else F.conv2d(x, w, b, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx, delta):
        x, w, feedback = ctx.saved_tensors
        if w.dim() == 2:
            return delta @ feedback, delta.T @ x, delta.sum(0), *[None] * 4
        stride, padding, groups = ctx.conv
        dx = nn.grad.conv2d_input(x.shape, feedback, delta, stride, padding, 1, groups)
        dw = nn.grad.conv2d_weight(x, w.shape, delta, stride, padding, 1, groups)
        db = delta.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return dx, dw, db, *[None] * 4


class Oracle(nn.Module):
    def __init__(self, net, matrices):
        super().__init__()
        self.net, self.matrices = net, matrices

    def forward(self, x):
        for i, layer in enumerate(self.net):
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                conv = isinstance(layer, nn.Conv2d)
                how = (layer.stride, layer.padding, layer.groups) if conv else (1, 0, 1)
                feedback = self.matrices.get(
                    f"aux.feedback_{i}.matrix", torch.full_like(layer.weight, torch.nan)
                )
                x = Backwards.apply(x, layer.weight, layer.bias, feedback, *how)
            else:
                x = layer(x.clone())
        return x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("splits", [(), ("0", "1", "4"), ("0", "2", "4")])
def test_against_the_rule_by_hand(name, splits):
    if splits == {"mlp": ("0", "1", "4"), "convnet": ("0", "2", "4")}[name]:
        splits = ("4",)  # a module between these would have nothing to train
    model = MODELS[name][0]()
    example = batch(name)[0]
    reference = copy.deepcopy(model)
    program = locc.compile(model, "fa", splits, example_inputs=example, optimizer=sgd(momentum=0.9))
    oracle = Oracle(reference, {n: b.clone() for n, b in feedback_of(program).items()})
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        x, y = batch(name)
        report = program.step(x, y)
        optimizer.zero_grad()
        loss = F.cross_entropy(oracle(x), y)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(report.loss, loss.detach(), atol=1e-10, rtol=0)
        close(model, reference)


def test_one_seed_one_set_of_matrices():
    x, _ = batch("mlp")
    a, b, c = (feedback_of(locc.compile(mlp(), "fa", ["1"], example_inputs=x, seed=n)) for n in (7, 7, 8))
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)


def test_frozen_layers_stay_and_pass_the_error_on():
    model = mlp()
    model[2].requires_grad_(False)
    x, y = batch("mlp")
    before = copy.deepcopy(model)
    program = locc.compile(model, "fa", ["1"], example_inputs=x, optimizer=sgd())
    program.step(x, y)
    assert torch.equal(model[2].weight, before[2].weight)
    assert not torch.equal(model[0].weight, before[0].weight)
    frozen = mlp()
    frozen[0].requires_grad_(False)
    program = locc.compile(frozen, "fa", [], example_inputs=x)
    assert list(feedback_of(program)) == ["aux.feedback_5.matrix"]  # nothing to train below layer 2


def test_a_parametrized_layer_keeps_its_parametrization():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    twin = copy.deepcopy(model)
    x, y = batch("mlp")
    program = locc.compile(model, "fa", ["1"], example_inputs=x, optimizer=sgd())
    assert {"feedback_2", "feedback_5"} <= set(program.root.aux)
    use_weights(program)
    program.step(x, y)
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach() - 0.1 * q.grad, atol=1e-12, rtol=0)


def old_weight_norm():
    model = mlp()
    handle = model[2].register_forward_pre_hook(lambda module, args: None)
    assert handle
    return model


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x):
        return F.bilinear(self.a(x), torch.tanh(self.a(x)), self.w)


def cells():
    return nn.Sequential(nn.Linear(6, 6), *(nn.GRUCell(6, 6) for _ in range(3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


REFUSED = {
    "two activations": (Bilinear, "'w' is multiplied with more than one activation"),
    "a hook": (old_weight_norm, "layer '2' has hooks"),
    "cells, in one sentence": (cells, r"'1' is a GRUCell \(as are 2 more\)[^\n]*$"),
    "picked matrices": (lambda: Experts(picked=True), "the matrices of 'weight' are picked by data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, message = REFUSED[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MethodError, match="undefined on this model.*" + message):
        locc.compile(model, "fa", [], example_inputs=torch.randn(5, 6, dtype=next(model.parameters()).dtype))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_tied_weights_across_modules_need_a_copy():
    x, y = torch.randn(5, 6), torch.randint(0, 6, (5,))
    with pytest.raises(MethodError, match="compile with tied='copy'"):
        locc.compile(Tied(), "fa", ["a"], example_inputs=x, tied="owner")
    program = locc.compile(Tied(), "fa", ["a"], example_inputs=x, tied="copy")
    program.step(x, y)
    assert list(feedback_of(program)) == ["aux.feedback_b.matrix"]


@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_zero_weights_learn_all_the_same(method):
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(D), batch("mlp")
    kept = copy.deepcopy(model)
    with pytest.raises(MethodError):
        locc.compile(model, method, ["1"], example_inputs=x, zero_init=True, init="nothing")
    assert torch.equal(model[0].weight, kept[0].weight)
    program = locc.compile(model, method, ["1"], example_inputs=x, zero_init=True, optimizer=sgd(0.5))
    assert all(p.abs().max() == 0 for p in model.parameters())
    for _ in range(3):
        program.step(x, y)
    assert all(p.abs().max() > 0 for p in model.parameters())


class Written(nn.Module):
    """Multiplies h [B,n] with a weight [m,n], or its transpose, in the manner of some library."""

    def __init__(self, product, transposed=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5) if transposed else torch.randn(5, 6))
        self.bias, self.product = nn.Parameter(torch.randn(5)), product

    def forward(self, h):
        return self.product(h, self.weight, self.bias)


class OwnLinear(nn.Linear):
    """As timm's."""

    def forward(self, h):
        return F.linear(h, self.weight.to(h.dtype), bias=self.bias.to(h.dtype))


class Around(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(4, 6), middle, nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.middle(torch.tanh(self.stem(x)))))


WRITTEN = {
    "linear": lambda: Written(F.linear),
    "keywords": lambda: Written(lambda h, w, b: F.linear(input=h, weight=w, bias=b)),
    "matmul": lambda: Written(lambda h, w, b: h @ w.t() + b),
    "method": lambda: Written(lambda h, w, b: h.matmul(w.T).add(b)),
    "left": lambda: Written(lambda h, w, b: (w @ h.t()).t() + b),
    "GPT-2's Conv1D": lambda: Written(lambda h, w, b: torch.addmm(b, h, w), transposed=True),
    "einsum": lambda: Written(lambda h, w, b: torch.einsum("bn,mn->bm", h, w) + b),
    "own layer": lambda: OwnLinear(6, 5),
    "adapter": lambda: Written(lambda h, w, b: F.linear(h, w + b[:, None] @ b[None, [0, 1, 2, 3, 4, 0]])),
}


@pytest.mark.parametrize("method", ["fa", "ss-usf"])
@pytest.mark.parametrize("name", WRITTEN)
def test_functions_are_rewritten_as_layers_are(name, method):
    model = Around(WRITTEN[name]()).to(D)
    x, y = torch.randn(7, 4, dtype=D), torch.randint(0, 3, (7,))
    program = locc.compile(model, method, ["middle"], example_inputs=x, optimizer=sgd(1.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    program.step(x, y)

    transposed = before["middle.weight"].shape == (6, 5)
    w = before["middle.weight"].T if transposed else before["middle.weight"]
    c = before["middle.bias"]
    if name == "adapter":
        w, c = w + c[:, None] @ c[None, [0, 1, 2, 3, 4, 0]], torch.zeros_like(c)
    if method == "fa":
        b, top = (feedback_of(program)[f"aux.feedback_{n}.matrix"] for n in ("middle", "head"))
        b = b if b.shape == w.shape else b.T
    else:
        b, top = w.sign() / 6**0.5, before["head.weight"].sign() / 5**0.5
    assert not torch.allclose(b, w)
    h = torch.tanh(x @ before["stem.weight"].T + before["stem.bias"])
    g = torch.tanh(h @ w.T + c)
    scores = g @ before["head.weight"].T + before["head.bias"]
    e = (scores.softmax(1) - F.one_hot(y, 3)) / 7
    a = (e @ top) * (1 - g**2)
    d = (a @ b) * (1 - h**2)
    moved = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    weight = a.T @ h
    expected = {"head.weight": e.T @ g, "head.bias": e.sum(0), "stem.weight": d.T @ x, "stem.bias": d.sum(0)}
    expected["middle.weight"] = weight.T if transposed else weight
    if name != "adapter":
        expected["middle.bias"] = a.sum(0)
    for n, update in expected.items():
        torch.testing.assert_close(moved[n], update, atol=1e-10, rtol=0, msg=n)


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        h = self.a(x)
        return self.out(self.attention(h, h, torch.tanh(h), need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x):
        return self.out(self.block(self.a(x)).mean(1))


class Standardised(nn.Conv2d):
    """As timm's ScaledStdConv2d."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


def standardised():
    return nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Tanh(), Standardised(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(16, 4)
    )


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, ids):
        return F.linear(torch.tanh(self.mix(self.embedding(ids))), self.embedding.weight)


TAKEN = {
    "attention": (Attends, (5, 7, 6), 4),
    "attention without biases": (lambda: Attends(bias=False), (5, 7, 6), 4),
    "attention with three weights": (lambda: Attends(kdim=8, vdim=8), (5, 7, 6), 4),
    "a transformer layer": (Encoder, (5, 7, 6), 4),
    "a standardised convolution": (standardised, (5, 2, 4, 4), 4),
    "tied weights": (TiedHead, None, 9),
    "a layer called three times": (find("shared_block").build, (5, 6), 4),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_libraries_do_is_backpropagation_with_the_weights_for_feedback(name):
    make, shape, classes = TAKEN[name]
    model = make().to(D)
    twin = copy.deepcopy(model)
    x = torch.randint(0, 9, (5,)) if shape is None else torch.randn(shape, dtype=D)
    y = torch.randint(0, classes, (5,))
    program = locc.compile(model, "fa", [], example_inputs=x, optimizer=sgd())
    random = copy.deepcopy(program.root.state_dict())
    F.cross_entropy(twin(x), y).backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in twin.named_parameters()}
    program.step(x, y)
    first = next(iter(expected))
    assert not torch.allclose(model.get_parameter(first), expected[first], atol=1e-8)
    program.root.load_state_dict(random)
    for path, matrix in feedback_of(program).items():
        layer = path.removeprefix("aux.feedback_").removesuffix(".matrix")
        held = {n.removesuffix(".weight").replace(".", "_"): p for n, p in model.named_parameters()}
        w = held[layer].detach()
        if name == "a standardised convolution" and w.dim() == 4:
            w = w - w.mean((1, 2, 3), keepdim=True)
            w = w / w.std((1, 2, 3), keepdim=True)
        matrix.copy_(w)
    program.step(x, y)
    for n, value in expected.items():
        torch.testing.assert_close(model.get_parameter(n), value, atol=1e-10, rtol=0, msg=n)


class Experts(nn.Module):
    """Each row is multiplied by the matrix that it chooses: rows are sorted, or matrices picked."""

    def __init__(self, picked=False):
        super().__init__()
        self.picked, self.gate, self.out = picked, nn.Linear(8, 3), nn.Linear(4, 4)
        self.inp, self.weight = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x):
        h = torch.tanh(self.inp(x))
        score, chosen = self.gate(h).max(-1)
        if self.picked:
            return self.out((self.weight[chosen] @ h[..., None])[..., 0] * score[:, None])
        chosen, order = chosen.sort()
        ends = (chosen[None] <= torch.arange(3)[:, None]).sum(1, dtype=torch.int32)
        rows = F.grouped_mm(h[order], self.weight.mT, offs=ends)
        return self.out((rows * score[order, None])[order.argsort()])


def test_experts_are_backpropagation_with_the_weights_for_feedback():
    model = Experts()  # PyTorch has this product in float32 and less
    twin, dense = copy.deepcopy(model), Experts(picked=True)
    dense.load_state_dict(model.state_dict())
    x, y = torch.randn(9, 6), torch.randint(4, (9,))
    program = locc.compile(model, "fa", [], example_inputs=x, optimizer=sgd())
    matrix = feedback_of(program)["aux.feedback_weight.matrix"]
    assert matrix.shape == (3, 8, 4)
    assert 0.8 < float(matrix.abs().max()) * 8**0.5 <= 1  # each matrix by the law of a layer
    for path, held in feedback_of(program).items():
        name = path.removeprefix("aux.feedback_").removesuffix(".matrix")
        held.copy_(twin.weight.mT if name == "weight" else twin.get_submodule(name).weight)
    F.cross_entropy(dense(x), y).backward()
    program.step(x, y)
    for (n, p), q in zip(dense.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p - 0.1 * p.grad, atol=1e-6, rtol=0, msg=n)


class OneOfEach(nn.Module):
    """A layer, and a product that stands right of its activation."""

    def __init__(self):
        super().__init__()
        self.inp, self.mid = nn.Linear(6, 8), nn.Linear(8, 7)
        self.out = nn.Parameter(torch.randn(7, 4) / 3)

    def forward(self, x):
        return torch.tanh(self.mid(torch.tanh(self.inp(x)))) @ self.out


@pytest.mark.parametrize("factory", [False, True])
def test_your_own_matrices(factory):
    given = {"mid": torch.randn(7, 8), "out": torch.randn(7, 4)}
    model, (x, y) = OneOfEach().to(D), batch("mlp")
    program = locc.compile(
        model, "fa", ["inp", "mid"], example_inputs=x, optimizer=sgd(),
        feedback=(lambda source, result, name: given[name]) if factory else given,
    )  # fmt: skip
    w1, w2, w3 = (w.detach().clone() for w in (model.inp.weight, model.mid.weight, model.out))
    h1 = torch.tanh(model.inp(x)).detach()
    h2 = torch.tanh(model.mid(h1)).detach()
    e = (torch.softmax(h2 @ w3, 1) - F.one_hot(y, 4)) / len(y)
    d2 = e @ given["out"].to(D).T * (1 - h2**2)
    d1 = d2 @ given["mid"].to(D) * (1 - h1**2)
    program.step(x, y)
    wanted = (w1 - 0.1 * d1.T @ x, w2 - 0.1 * d2.T @ h1, w3 - 0.1 * h2.T @ e)
    for found, right in zip((model.inp.weight, model.mid.weight, model.out), wanted, strict=True):
        torch.testing.assert_close(found.detach(), right, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mid": torch.zeros(8, 7), "out": torch.zeros(7, 4)}, r"'mid': give a tensor of shape \(7, 8\)"),
        ({"mid": torch.zeros(7, 8)}, "module 'out': the dict has none for it; known: 'mid'"),
    ],
)
def test_wrong_matrices_of_your_own_are_refused(given, message):
    with pytest.raises(MethodError, match=message):
        locc.compile(OneOfEach().to(D), "fa", ["inp"], example_inputs=batch("mlp")[0], feedback=given)
