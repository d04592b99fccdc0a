"""`cdni`: labels enter the synthesisers, in training only.

The authors' code is not public; read beside the paper: `BasicSynthesizer.forward` of koz4k/dni-pytorch,
a1ba1f2, dni.py, lines 331 to 352, adds a linear map of the context to the first layer. Ours departs in that
this map has no bias of its own, which the layer has, and in that hidden layers are normalised.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.errors import MethodError
from locc.ir import TensorSpec
from locc_passes.synthetic.passes import labels_for
from support import batch, close, compiled, mlp, sgd


class Conditioned(nn.Module):
    """A synthesiser that a test can write down: linear in the value and in the one-hot label."""

    def __init__(self, value: TensorSpec, output: TensorSpec) -> None:
        super().__init__()
        (width,), (classes,) = value.features, output.features
        self.value, self.label = nn.Linear(width, width), nn.Linear(classes, width, bias=False)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        hot = nn.functional.one_hot(y, self.label.in_features).to(h.dtype)
        result: Tensor = self.value(h) + self.label(hot)
        return result


def test_steps_equal_the_formulas() -> None:
    model = mlp().double()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, "cdni", ["relu1"], optimizer=sgd(0.05), factory=Conditioned)
    other, net = copy.deepcopy(model), copy.deepcopy(program.root.aux["relu1_synthesiser"])
    for _ in range(3):
        program.step(x, y)
        h = torch.relu(other.first(x))
        guess = h.detach() @ net.value.weight.T + net.value.bias + net.label.weight.T[y]
        entry = h.detach().requires_grad_()
        loss = nn.functional.cross_entropy(other.third(torch.relu(other.second(entry))), y)
        (h * guess.detach() / len(x)).sum().backward()
        loss.backward()
        assert entry.grad is not None
        ((guess - len(x) * entry.grad) ** 2).sum(1).mean().backward()
        with torch.no_grad():
            for p in (*other.parameters(), *net.parameters()):
                assert p.grad is not None
                p -= 0.05 * p.grad
                p.grad = None
        for a, b in ((model, other), (program.root.aux["relu1_synthesiser"], net)):
            close(a, b)


def test_the_default_synthesiser_adds_a_linear_map_of_the_one_hot_label() -> None:
    program = compiled(mlp(), "cdni", ["relu1"], width=16)
    net = program.root.aux["relu1_synthesiser"]
    _, y = batch()
    torch.nn.init.normal_(net.last.weight)
    h = torch.randn(5, 8)
    hot = nn.functional.one_hot(y, 3).float()
    wanted = net.last(net.hidden(net.first(h) + hot @ net.context.weight.T))
    assert torch.allclose(net(h, y), wanted, atol=1e-6)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(tokens))))


def test_labels_of_tokens_reach_their_own_position() -> None:
    tokens = torch.randint(11, (4, 7))
    program = locc.compile(Tokens(), "cdni", ["embed", "mid"], example_inputs=tokens, width=16)
    net = program.root.aux["mid_synthesiser"]
    torch.nn.init.normal_(net.last.weight)
    seen: list[Any] = []
    net.register_forward_hook(lambda module, args, result: seen.append((args, result)))
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 11
    program.step(tokens, tokens)
    (h, labels), _ = seen[0]
    assert torch.equal(labels, tokens)
    changed = (net(h, tokens) - net(h, other)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("target", "value", "classes", "expected"),
    [
        (torch.arange(4), (4, 9), 5, (4,)),
        (torch.zeros(4, 1, dtype=torch.long), (4, 9), 5, (4,)),
        (torch.rand(4, 5), (4, 9), 5, (4, 5)),
        (torch.zeros(4, 7, dtype=torch.long), (4, 7, 9), 5, (4, 7)),
        (torch.zeros(4, 7, dtype=torch.long), (28, 9), 5, (28,)),
        (torch.zeros(4, dtype=torch.long), (4, 3, 8, 8), 5, (4,)),
        (torch.zeros(4, 8, 8, dtype=torch.long), (4, 3, 4, 4), 5, (4, 8, 8)),
        (torch.rand(4, 5, 8, 8), (4, 3, 8, 8), 5, (4, 8, 8, 5)),
    ],
)
def test_labels_are_brought_to_the_rows_of_the_value(
    target: Tensor, value: tuple[int, ...], classes: int, expected: tuple[int, ...]
) -> None:
    found = labels_for(target, torch.zeros(value), 0, classes)
    assert tuple(found.shape) == expected


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"y": torch.arange(4)}, "one tensor, found dict"),
        (torch.arange(3), "a label for each row"),
        (torch.zeros(4, 7, dtype=torch.long), "a label for each row"),
        (torch.tensor(1), "a label for each row"),
    ],
)
def test_targets_that_are_no_labels_are_refused(target: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        labels_for(target, torch.zeros(4, 9), 0, 5)


class Shortening(nn.Module):
    """A sequence of twelve, and a label for every second place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(tokens)))[:, ::2])


def test_labels_of_other_positions_are_refused_when_compiling() -> None:
    with pytest.raises(MethodError, match="module 'embed': its sequence has 12 positions, and those of the"):
        locc.compile(Shortening(), "cdni", ["embed"], example_inputs=torch.randint(9, (3, 12)))
