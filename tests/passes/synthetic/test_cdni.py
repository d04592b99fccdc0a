"""`cdni`: labels enter the synthesisers, in training only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from examples.digits import digits, loaders
from examples.models import SmallCNN
from locc.errors import MethodError
from locc.ir import TensorSpec
from locc_passes.synthetic.passes import labels_for
from support import batch, compiled, mlp, same, sgd, snapshot

SPLITS = ["relu1", "relu2"]

BEFORE = """\
# 2 modules: relu1, output
def step(self, input_1, target):
    # ---- module 0: relu1
    first = self.first(input_1)  # f32[B,8]
    relu1 = self.relu1(first)  # f32[B,8]
    # ---- module 1: output
    relu1_at_output = stop_gradient(relu1)  # f32[B,8]
    drop = self.drop(relu1_at_output)  # f32[B,8]
    second = self.second(drop)  # f32[B,8]
    relu2 = self.relu2(second)  # f32[B,8]
    third = self.third(relu2)  # f32[B,3]
    return third
"""

AFTER = """\
# 2 modules: relu1, output
def step(self, input_1, target):
    # ---- module 0: relu1
    first = self.first(input_1)  # f32[B,8]
    relu1 = self.relu1(first)  # f32[B,8]
    # ---- auxiliary: relu1.synthesiser
    relu1_at_relu1_synthesiser = stop_gradient(relu1)  # f32[B,8]
    labels = labels_for(target, relu1_at_relu1_synthesiser, 0, 3)
    aux_relu1_synthesiser = self.aux.relu1_synthesiser(relu1_at_relu1_synthesiser, labels)  # f32[B,8]
    # ---- module 0: relu1
    aux_relu1_synthesiser_at_relu1 = stop_gradient(aux_relu1_synthesiser)  # f32[B,8]
    synthetic = of_batch(aux_relu1_synthesiser_at_relu1, 0)  # f32[B,8]
    chain = inner(relu1, synthetic)  # f32[]
    objective(chain)  # relu1.synthetic
    # ---- module 1: output
    relu1_at_output = stop_gradient(relu1)  # f32[B,8]
    drop = self.drop(relu1_at_output)  # f32[B,8]
    second = self.second(drop)  # f32[B,8]
    relu2 = self.relu2(second)  # f32[B,8]
    third = self.third(relu2)  # f32[B,3]
    loss = cross_entropy(third, target)  # f32[]
    objective(loss)  # output.loss
    grad_relu1_at_output = gradient(loss, relu1_at_output)  # f32[B,8]
    # ---- auxiliary: relu1.synthesiser
    grad_relu1_at_output_at_relu1_synthesiser = stop_gradient(grad_relu1_at_output)  # f32[B,8]
    target_1 = of_sample(grad_relu1_at_output_at_relu1_synthesiser, 0)  # f32[B,8]
    regression = squared_distance(aux_relu1_synthesiser, target_1, 0)  # f32[]
    objective(regression)  # relu1.synthesiser.regression
    return third
"""


def test_the_printed_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCC_DUMP", str(tmp_path))
    program = compiled(mlp(), "cdni", ["relu1"], width=16)
    assert (tmp_path / "000_partition.py").read_text() == BEFORE
    assert str(program.ir) == AFTER


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
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                assert torch.allclose(p, q, rtol=0, atol=1e-10)


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


def test_every_parameter_trains_at_token_level() -> None:
    tokens = torch.randint(11, (8, 7))
    program = locc.compile(Tokens(), "cdni", ["embed", "mid"], example_inputs=tokens, width=16)
    before = snapshot(program.root)
    for _ in range(4):
        program.step(tokens, tokens)
    after = snapshot(program.root)
    assert [k for k in before if torch.equal(before[k], after[k])] == []


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


def test_inference_reads_no_label() -> None:
    x, y = batch()
    model = mlp()
    program = compiled(model, "cdni", SPLITS, width=16)
    program.step(x, y)
    program.eval()
    assert torch.equal(program(x), model(x))
    assert not any("target" in n.name or "aux" in str(n.target) for n in program.ir.inference.nodes)


def test_the_first_hidden_update_is_zero() -> None:
    x, y = batch()
    model = mlp()
    program = compiled(model, "cdni", SPLITS, width=16)
    before = snapshot(model)
    program.step(x, y)
    after = snapshot(model)
    still = ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert [k for k in before if torch.equal(before[k], after[k])] == still


def test_save_and_load_resume_bit_for_bit(tmp_path: Path) -> None:
    x, y = batch()
    program = compiled(mlp(), "cdni", SPLITS, width=16)
    program.step(x, y)
    program.save(tmp_path / "state.safetensors")
    program.step(x, y)
    wanted = snapshot(program.root)
    program.load(tmp_path / "state.safetensors")
    program.step(x, y)
    assert same(wanted, snapshot(program.root))


@pytest.mark.slow
def test_it_learns_digits() -> None:
    """Four epochs of Adam(1e-3); a head on untrained layers reaches less."""
    torch.set_num_threads(1)  # as fast on tensors this small
    training, validation = loaders(64)
    stages = ["layer1", "layer2", "layer3"]
    accuracies = []
    for frozen in (False, True):
        torch.manual_seed(0)
        example = digits().train_x[:64]
        program = compiled(
            SmallCNN(8), "cdni", stages, example_inputs=example, width=16, seed=0, optimizer=locc.Recipe()
        )
        for name in stages if frozen else []:
            program.optimizers[name].param_groups[0]["lr"] = 0.0
        program.fit(training, epochs=4, progress=False)
        accuracies.append(program.evaluate(validation).accuracy or 0.0)
    assert accuracies[0] > 0.85
    assert accuracies[0] > accuracies[1] + 0.05


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
