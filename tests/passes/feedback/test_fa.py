import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locc
from examples.digits import digits, loaders
from golden import stages
from locc.errors import MethodError

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


BEFORE = """\
# 3 modules: 1, 4, 5
def step(self, input_1, target):
    # ---- module 0: 1
    layer_0 = self[0](input_1)  # f64[B,8]
    layer_1 = self[1](layer_0)  # f64[B,8]
    # ---- module 1: 4
    layer_1_at_4 = stop_gradient(layer_1)  # f64[B,8]
    layer_2 = self[2](layer_1_at_4)  # f64[B,7]
    layer_3 = self[3](layer_2)  # f64[B,7]
    layer_4 = self[4](layer_3)  # f64[B,7]
    # ---- module 2: 5
    layer_4_at_5 = stop_gradient(layer_4)  # f64[B,7]
    layer_5 = self[5](layer_4_at_5)  # f64[B,4]
    return layer_5
"""

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


def test_the_training_graph(tmp_path, monkeypatch):
    found = stages(tmp_path, monkeypatch, mlp(), "fa", ["1", "4"], example_inputs=batch("mlp")[0])
    assert found["partition"] == BEFORE
    assert found["gradient_chain"] == AFTER


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
        for (n, p), q in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-10, rtol=0, msg=n)


@pytest.mark.parametrize("name", MODELS)
def test_with_the_weights_for_feedback_it_is_backpropagation(name):
    model = MODELS[name][0]()
    twin = copy.deepcopy(model)
    example, _ = batch(name)
    fa = locc.compile(model, "fa", ["1", "4"], example_inputs=example, optimizer=sgd())
    bp = locc.compile(twin, "bp", ["1", "4"], example_inputs=example, optimizer=sgd())
    for _ in range(3):
        x, y = batch(name)
        use_weights(fa)
        fa.step(x, y)
        bp.step(x, y)
        for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-12, rtol=0)


def test_with_random_feedback_it_is_not_backpropagation():
    model = mlp()
    twin = copy.deepcopy(model)
    x, y = batch("mlp")
    for m, method in ((model, "fa"), (twin, "bp")):
        locc.compile(m, method, ["1", "4"], example_inputs=x, optimizer=sgd()).step(x, y)
    assert not torch.allclose(model[0].weight, twin[0].weight)
    assert not torch.allclose(model[2].weight, twin[2].weight)
    # The error at the output is exact, so the last layer learns as it does in backpropagation.
    torch.testing.assert_close(model[5].weight, twin[5].weight, atol=1e-12, rtol=0)


def test_the_matrices_are_fixed_checkpointed_and_in_no_optimizer(tmp_path):
    x, y = batch("convnet")
    program = locc.compile(
        convnet(), "fa", ["2", "4"], example_inputs=x, optimizer=sgd(weight_decay=0.1), seed=3
    )
    before = {n: b.clone() for n, b in feedback_of(program).items()}
    assert list(before) == ["aux.feedback_3.matrix", "aux.feedback_7.matrix"]
    assert before["aux.feedback_3.matrix"].shape == program.model[3].weight.shape
    for _ in range(4):
        program.step(x, y)
    for name, matrix in feedback_of(program).items():
        assert torch.equal(matrix, before[name])
        assert not matrix.requires_grad
    held = {id(p) for o in program.optimizers.values() for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in program.model.parameters()}
    program.save(tmp_path / "a.st")
    other = locc.compile(
        convnet(), "fa", ["2", "4"], example_inputs=x, optimizer=sgd(weight_decay=0.1), seed=4
    )
    assert not torch.equal(feedback_of(other)["aux.feedback_3.matrix"], before["aux.feedback_3.matrix"])
    other.load(tmp_path / "a.st")
    program.step(x, y)
    other.step(x, y)
    for p, q in zip(program.root.state_dict().values(), other.root.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_one_seed_one_set_of_matrices():
    x, _ = batch("mlp")
    a, b = (feedback_of(locc.compile(mlp(), "fa", ["1"], example_inputs=x, seed=7)) for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)


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


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.block, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.inp(x)
        for _ in range(3):
            x = torch.tanh(self.block(x))
        return self.out(x)


def test_a_layer_called_three_times_has_one_matrix():
    model = Shared().to(D)
    twin = copy.deepcopy(model)
    x, y = torch.randn(5, 4, dtype=D), torch.randint(0, 3, (5,))
    program = locc.compile(model, "fa", [], example_inputs=x, optimizer=sgd())
    assert list(feedback_of(program)) == ["aux.feedback_block.matrix", "aux.feedback_out.matrix"]
    use_weights(program)
    program.step(x, y)
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach() - 0.1 * q.grad, atol=1e-12, rtol=0)


def test_a_parametrized_layer_keeps_its_parametrization():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    twin = copy.deepcopy(model)
    x, y = batch("mlp")
    program = locc.compile(model, "fa", ["1"], example_inputs=x, optimizer=sgd())
    use_weights(program)
    program.step(x, y)
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach() - 0.1 * q.grad, atol=1e-12, rtol=0)


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return self.a(x) @ self.w.t()


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def old_weight_norm():
    model = mlp()
    handle = model[2].register_forward_pre_hook(lambda module, args: None)
    assert handle
    return model


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.attention, self.out = nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x):
        h = self.a(x).unsqueeze(0)
        return self.out(self.attention(h, h, h, need_weights=False)[0].squeeze(0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.cell, self.out = nn.Linear(6, 8), nn.GRUCell(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.cell(self.a(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


REFUSED = {
    "a raw product": (Raw, "'w' is multiplied with activations outside"),
    "an own forward": (
        lambda: nn.Sequential(nn.Linear(6, 6), Own(6, 4)),
        "Own with a forward of its own; use nn.Linear",
    ),
    "a hook": (old_weight_norm, "layer '2' has hooks"),
    "attention": (Attends, "attention"),
    "a recurrent cell": (Recurrent, "'cell' is a GRUCell"),
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


def test_zero_weights_learn_all_the_same():
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    kept = copy.deepcopy(model)
    with pytest.raises(MethodError):
        locc.compile(model, "fa", ["1"], example_inputs=torch.randn(5, 64), zero_init=True, init="nothing")
    assert torch.equal(model[0].weight, kept[0].weight)
    data = digits()
    program = locc.compile(
        model, "fa", ["1"], example_inputs=data.train_x.flatten(1)[:5], zero_init=True, optimizer=sgd(0.5)
    )
    assert all(p.abs().max() == 0 for p in model.parameters())
    for _ in range(40):
        program.step(data.train_x.flatten(1), data.train_y)
    assert all(p.abs().max() > 0 for p in model.parameters())


def test_it_learns_digits():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    train, validation = loaders()
    program = locc.compile(model, "fa", ["3"], example_inputs=digits().train_x[:4], optimizer=locc.Recipe())
    program.fit(train, epochs=6, progress=False)
    assert program.evaluate(validation).accuracy > 0.9


def test_a_transformer_with_the_weights_for_feedback_is_backpropagation():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        num_labels=3,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config).to(D)
    twin = copy.deepcopy(model)
    x, y = {"input_ids": torch.randint(0, 20, (3, 5))}, torch.randint(0, 3, (3,))
    fa = locc.compile(model, "fa", ["bert.encoder.layer.0"], example_inputs=x, optimizer=sgd())
    assert len(feedback_of(fa)) == 2 * 6 + 2  # every linear layer above the embeddings
    bp = locc.compile(twin, "bp", ["bert.encoder.layer.0"], example_inputs=x, optimizer=sgd())
    use_weights(fa)
    fa.step(x, y)
    bp.step(x, y)
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=0, msg=name)


def test_many_layers_of_one_kind_are_refused_in_one_sentence():
    model = nn.Sequential(nn.Linear(6, 6), *(nn.GRUCell(6, 6) for _ in range(3)))
    with pytest.raises(MethodError) as caught:
        locc.compile(model, "fa", [], example_inputs=torch.randn(5, 6))
    assert str(caught.value).count("GRUCell") == 1
    assert "'1' is a GRUCell (as are 2 more)" in str(caught.value)


def test_a_layer_that_only_export_can_open_is_refused_and_not_left_exact():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.block(self.stem(x)).mean(1))

    with pytest.raises(
        locc.MethodError, match=r"is multiplied with activations .*'block\.self_attn\.in_proj_weight'"
    ):
        locc.compile(Model(), "fa", ["block"], example_inputs=torch.randn(5, 6, 4))
