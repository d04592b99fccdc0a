"""`dfa`: the training graph, the rule by hand, its limit, and what receives an error.

The author's formulation (anokland/dfa-torch): B e is `ErrorFeedback:updateGradInput` (e3212a9,
Models/ErrorFeedback.lua, lines 23 to 65), put in by `Sequential2:backward` (17dae73, Models/Sequential2.lua,
lines 21 to 46). Ours departs in e: the gradient of the user's loss, a mean over the batch if that is one,
where theirs is p - y, not averaged (592537b, Models/BCECriterion.lua, lines 48 to 68).
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locc
from examples.digits import digits
from locc.errors import MethodError
from support import Ids, close, sgd

D = torch.float64


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Linear(7, 4)
    ).to(D)


def batch(size=5):
    return torch.randn(size, 6, dtype=D), torch.randint(0, 4, (size,))


AFTER = """\
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
    loss = cross_entropy(layer_5, target)  # f64[]
    objective(loss)  # 5.loss
    grad_layer_5 = gradient(loss, layer_5)  # f64[B,4]
    # ---- module 0: 1
    grad_layer_5_at_1 = stop_gradient(grad_layer_5)  # f64[B,4]
    aux_feedback_1 = self.aux.feedback_1(grad_layer_5_at_1)  # f64[B,8]
    feedback = inner(layer_1, aux_feedback_1)  # f64[]
    objective(feedback)  # 1.feedback
    # ---- module 1: 4
    grad_layer_5_at_4 = stop_gradient(grad_layer_5)  # f64[B,4]
    aux_feedback_4 = self.aux.feedback_4(grad_layer_5_at_4)  # f64[B,7]
    feedback_1 = inner(layer_4, aux_feedback_4)  # f64[]
    objective(feedback_1)  # 4.feedback
    return layer_5
"""


def test_the_training_graph():
    assert str(locc.compile(mlp(), "dfa", ["1", "4"], example_inputs=batch()[0]).ir) == AFTER


def test_against_the_rule_by_hand():
    model = mlp()
    w = copy.deepcopy(model)
    x, _ = batch()
    program = locc.compile(model, "dfa", ["1", "4"], example_inputs=x, optimizer=sgd())
    b1, b2 = (b.clone() for n, b in program.root.named_buffers() if n.startswith("aux."))
    assert b1.shape == (8, 4)
    assert b1.abs().max() <= 8**-0.5
    for _ in range(3):
        x, y = batch()
        program.step(x, y)
        with torch.no_grad():
            a1 = x @ w[0].weight.T + w[0].bias
            h1 = torch.tanh(a1)
        h2 = w[4](w[3](w[2](h1)))  # BatchNorm's own backward inside the module: PyTorch's
        with torch.no_grad():
            p = torch.softmax(h2 @ w[5].weight.T + w[5].bias, 1)
            e = (p - F.one_hot(y, 4)) / len(y)  # before the softmax, batch mean included
            delta1 = (e @ b1.T) * (1 - h1**2)
            gradients = [delta1.T @ x, delta1.sum(0)]
        gradients += torch.autograd.grad(h2, [*w[2].parameters(), *w[3].parameters()], e @ b2.T)
        gradients += [e.T @ h2.detach(), e.sum(0)]
        with torch.no_grad():
            for q, g in zip(w.parameters(), gradients, strict=True):
                q -= 0.1 * g
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, w.state_dict()[name], atol=1e-10, rtol=0, msg=name)


def test_with_one_hidden_layer_it_is_feedback_alignment():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(D)
    twin = copy.deepcopy(model)
    x, y = batch()
    dfa = locc.compile(model, "dfa", ["1"], example_inputs=x, optimizer=sgd())
    fa = locc.compile(twin, "fa", ["1"], example_inputs=x, optimizer=sgd())
    dfa.root.get_submodule("aux.feedback_1").matrix.copy_(fa.root.get_submodule("aux.feedback_2").matrix.T)
    for _ in range(4):
        x, y = batch()
        dfa.step(x, y)
        fa.step(x, y)
    close(model, twin, 1e-12)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)

    def forward(self, tokens):
        return {"logits": self.head(torch.tanh(self.mid(self.embed(tokens)))), "extra": tokens.sum()}


def test_tokens_receive_their_own_errors():
    model = Tokens().to(D)
    twin = copy.deepcopy(model)
    tokens, y = torch.randint(0, 9, (3, 5)), torch.randint(0, 9, (3, 5))
    y[0, 2:] = -100
    program = locc.compile(model, "dfa", ["embed", "mid"], example_inputs=tokens, optimizer=sgd())
    b = program.root.get_submodule("aux.feedback_embed").matrix
    assert b.shape == (6, 9)
    program.step(tokens, y)
    with torch.no_grad():
        p = torch.softmax(twin(tokens)["logits"], -1)
        asked = (y != -100).unsqueeze(-1)
        e = (p - F.one_hot(y.clamp(min=0), 9)) * asked / asked.sum()
    twin.embed(tokens).backward(e @ b.T)
    got = model.embed.weight
    torch.testing.assert_close(
        got, (twin.embed.weight - 0.1 * twin.embed.weight.grad).detach(), atol=1e-10, rtol=0
    )


def test_convolutions_have_a_full_matrix():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    program = locc.compile(model, "dfa", ["1"], example_inputs=digits().train_x[:4])
    assert program.root.get_submodule("aux.feedback_1").matrix.shape == (108, 10)


def test_a_module_without_an_activation_to_teach_is_refused():
    with pytest.raises(MethodError, match="'ids' sends no floating-point value"):
        locc.compile(Ids(6), "dfa", example_inputs=torch.randn(5, 6))


def test_a_borrowed_parameter_gets_its_readers_gradient():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)).to(D)
    model[2].weight = model[0].weight
    twin = copy.deepcopy(model)
    x, y = torch.randn(5, 6, dtype=D), torch.randint(0, 6, (5,))
    program = locc.compile(model, "dfa", ["1"], example_inputs=x, optimizer=sgd(), tied="owner")
    b = program.root.get_submodule("aux.feedback_1").matrix
    program.step(x, y)
    w = twin[0].weight
    h = torch.tanh(x @ w.T)
    e = (torch.softmax(h @ w.T, 1) - F.one_hot(y, 6)) / len(y)
    gradient = ((e @ b.T) * (1 - h**2)).T @ x + e.T @ h
    torch.testing.assert_close(model[0].weight, w - 0.1 * gradient, atol=1e-10, rtol=0)


class Twice(nn.Module):
    """Sends a value and another one that is computed from it."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        return self.out(locc.split(torch.tanh(h), "a")) + h


def test_the_error_enters_where_a_module_ends():
    program = locc.compile(Twice(), "dfa", example_inputs=torch.randn(5, 6))
    assert len(program.ir.crossing("a")) == 2
    assert list(dict(program.root.aux.named_buffers())) == ["feedback_a.matrix"]
