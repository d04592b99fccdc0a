from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locc
from locc.nn import DGLHead, LinearHead
from support import Residual, Tied, batch, close, mlp, sgd
from zoo import find

AFTER = """\
# 3 modules: first, second, third
def step(self, input_1, target):
    # ---- module 0: first
    first = self.first(input_1)  # f32[B,8]
    aux_first_head_first = self.aux.first_head_first(first)  # f32[B,3]
    head_loss = cross_entropy(aux_first_head_first, target)  # f32[]
    objective(head_loss)  # first.loss
    # ---- module 1: second
    first_at_second = stop_gradient(first)  # f32[B,8]
    relu1 = self.relu1(first_at_second)  # f32[B,8]
    drop = self.drop(relu1)  # f32[B,8]
    second = self.second(drop)  # f32[B,8]
    aux_second_head_second = self.aux.second_head_second(second)  # f32[B,3]
    head_loss_1 = cross_entropy(aux_second_head_second, target)  # f32[]
    objective(head_loss_1)  # second.loss
    # ---- module 2: third
    second_at_third = stop_gradient(second)  # f32[B,8]
    relu2 = self.relu2(second_at_third)  # f32[B,8]
    third = self.third(relu2)  # f32[B,3]
    loss = cross_entropy(third, target)  # f32[]
    objective(loss)  # third.loss
    return third
"""


def test_the_printed_graph() -> None:
    assert str(locc.compile(mlp(), "dgl", ["first", "second"], example_inputs=batch()[0]).ir) == AFTER


def conv(width: int = 4, classes: int = 3) -> nn.Sequential:
    first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(width, 6, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(first, second, nn.Sequential(nn.Flatten(), nn.Linear(96, classes)))


@pytest.mark.parametrize("head", ["mlp-sr", "cnn", "linear"])
def test_three_steps_equal_the_formulas(head: str) -> None:
    """The oracle: one module after the other, forward, CE of the auxiliary, SGD, pass the old output on.

    The authors' formulation (eugenium/DGL, a9c8786, auxiliary_nets_study): cifar_dgl.py, lines 161 to 174;
    the heads "mlp-sr", "mlp" and "cnn" are `auxillary_classifier2`, models.py, lines 101 to 170. Ours departs
    in that a hidden linear layer has at most `hidden` units.
    """
    model = conv().double()
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    y = torch.randint(3, (8,))
    program = locc.compile(model, "dgl", ["0", "1"], example_inputs=x, optimizer=sgd(), head=head)
    parts, heads = copy.deepcopy(list(model)), [copy.deepcopy(h) for h in program.root.aux.values()]
    assert len(heads) == 2
    heads.append(nn.Identity())  # the last module's head is the network's own
    optimizers = [
        torch.optim.SGD([*part.parameters(), *aux.parameters()], lr=0.1)
        for part, aux in zip(parts, heads, strict=True)
    ]
    for _ in range(3):
        report, h = program.step(x, y), x
        for part, aux, optimizer, found in zip(
            parts, heads, optimizers, report.objectives.values(), strict=True
        ):
            out = part(h.detach())
            loss = F.cross_entropy(aux(out), y)
            torch.testing.assert_close(found, loss, atol=1e-10, rtol=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            h = out
    close(model, nn.Sequential(*parts))
    close(nn.ModuleList(program.root.aux.values()), nn.ModuleList(heads))


def test_the_default_head_is_the_published_one_on_images_and_linear_elsewhere() -> None:
    """What the published one is, tests/nn/test_heads.py says."""
    for model, split, x, kind in (
        (conv(), "0", torch.randn(4, 1, 8, 8), DGLHead),
        (mlp(), "first", batch()[0], LinearHead),
    ):
        program = locc.compile(model, "dgl", [split], example_inputs=x)
        assert [type(head) for head in program.root.aux.values()] == [kind]


def test_a_factory_replaces_the_head() -> None:
    asked = []

    def factory(boundary: Any, output: Any) -> nn.Module:
        asked.append((str(boundary), str(output)))
        return nn.Linear(boundary.shape[-1], output.shape[-1])

    model = mlp().double()
    program = locc.compile(
        model, "dgl", ["first"], example_inputs=batch(dtype=torch.float64)[0], head=factory
    )
    assert asked == [("f64[B,8]", "f64[B,3]")]
    assert [p.dtype for p in program.root.aux.parameters()] == [torch.float64] * 2  # the boundary's
    program.step(*batch(dtype=torch.float64))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda h, o: None, r"head of module 'first': the factory returned a NoneType"),
        (lambda h, o: nn.LazyLinear(3), r"head of module 'first'.*lazy.*f32\[B,8\]"),
        (lambda h, o: nn.Linear(8, 4), r"head of module 'first' .*\(2, 4\).*f32\[B,3\]"),
        ("mlpsr", r"module 'first': head 'mlpsr' is unknown; nearest: .*'mlp-sr'"),
    ],
)
def test_a_wrong_head_is_refused(factory: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(locc.MethodError, match=message):
        locc.compile(model, "dgl", ["first"], example_inputs=batch()[0], head=factory)


def test_a_module_that_sends_nothing_it_trains_is_refused() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(locc.split(x + self.a(x).argmax(-1, keepdim=True), "cut"))

    with pytest.raises(locc.MethodError, match="'cut' sends no floating-point value that its own parameters"):
        locc.compile(Detour(), "dgl", ["cut"], example_inputs=batch()[0])


def test_a_value_that_contains_another_crossing_value_carries_the_head() -> None:
    """Of the values that a residual network sends, the later one depends on the earlier: one head."""
    model = Residual()
    program = locc.compile(model, "dgl", ["blocks.0", "blocks.1"], example_inputs=batch()[0], optimizer=sgd())
    assert len(program.ir.boundaries()) > 2
    assert len(program.root.aux) == 2
    before = copy.deepcopy(model.state_dict())
    program.step(*batch())
    assert not [n for n, v in model.state_dict().items() if torch.equal(v, before[n])]


def test_each_independent_output_has_a_head_and_their_losses_add_up() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 6)])
            self.of_left, self.of_right = nn.Linear(5, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = (tower(x) for tower in self.towers)
            return self.of_left(left) + self.of_right(right)

    x, y = batch(dtype=torch.float64)
    torch.manual_seed(1)
    model = Two().double()
    program = locc.compile(model, "dgl", ["towers"], example_inputs=x, optimizer=sgd(), head="linear")
    twin, heads = copy.deepcopy(model), [copy.deepcopy(h) for h in program.root.aux.values()]
    report = program.step(x, y)
    losses = sum(F.cross_entropy(head(own(x)), y) for head, own in zip(heads, twin.towers, strict=True))
    assert isinstance(losses, Tensor)
    torch.testing.assert_close(report.objectives["towers.loss"], losses, atol=1e-12, rtol=0)
    losses.backward()
    for trained, own in zip(model.towers, twin.towers, strict=True):
        wanted = own.weight - 0.1 * own.weight.grad
        torch.testing.assert_close(trained.weight, wanted, atol=1e-12, rtol=0)


def test_several_outputs_of_a_recurrent_layer() -> None:
    case = find("lstm_state")
    model = case.build()
    before = copy.deepcopy(model.state_dict())
    program = locc.compile(
        model, "dgl", ["rnn"], loss=case.loss, example_inputs=case.inputs(), optimizer=sgd()
    )
    for _ in range(2):
        program.step(case.inputs(), case.target(4))
    assert not [n for n, v in model.state_dict().items() if torch.equal(v, before[n])]


class Structured(nn.Module):
    """Returns its logits in a dict, alone or with the features."""

    def __init__(self, features: bool) -> None:
        super().__init__()
        self.body, self.head, self.features = nn.Linear(4, 6), nn.Linear(6, 3), features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"features": h, "logits": self.head(h)} if self.features else {"logits": self.head(h)}


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", lambda out, y: F.cross_entropy(out["logits"], y)])
def test_the_users_loss_sees_the_structure_of_the_output(features: bool, loss: Any) -> None:
    x, y = batch(dtype=torch.float64)
    model = Structured(features).double()
    program = locc.compile(
        model, "dgl", ["body"], loss=loss, example_inputs=x, optimizer=sgd(), head="linear"
    )
    (head,) = program.root.aux.values()
    with torch.no_grad():
        h = model.body(x)
        h = torch.tanh(h) if "tanh" in str(program.ir).split("head_loss")[0] else h
        wanted = F.cross_entropy(copy.deepcopy(head)(h), y)
    torch.testing.assert_close(program.step(x, y).objectives["body.loss"], wanted, atol=1e-12, rtol=0)


def test_a_local_loss_of_its_own() -> None:
    def loss(out: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(out["logits"], y) + out["features"].square().mean()

    options: dict[str, Any] = {"loss": loss, "example_inputs": batch()[0]}
    for local in ("cross_entropy", F.cross_entropy):
        program = locc.compile(Structured(True), "dgl", ["body"], local_loss=local, **options)
        assert program.step(*batch()).objectives["body.loss"].isfinite()


def test_token_level_language_model_with_tied_weights() -> None:
    tokens, y = torch.randint(11, (4, 6)), torch.randint(11, (4, 6))
    model = Tied()
    program = locc.compile(
        model, "dgl", ["embed", "mid"], example_inputs=tokens, tied="owner", optimizer=sgd()
    )
    assert [h(torch.randn(4, 6, 5)).shape for h in program.root.aux.values()] == [(4, 6, 11)] * 2
    before = copy.deepcopy(model.state_dict())
    program.step(tokens, y)
    assert not [n for n, v in model.state_dict().items() if torch.equal(v, before[n])]


def test_channels_last_boundaries_are_recognised_by_their_layers() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.gelu(self.a(x))).mean((1, 2))

    # [B,5,5,5]: the shape tells nothing, the linear layer does.
    program = locc.compile(Last(), "dgl", ["a"], example_inputs=torch.randn(4, 5, 5, 3), head="linear")
    (head,) = program.root.aux.values()
    assert head.readout.layout.channel_dim == 3
    program = locc.compile(
        Last(), "dgl", ["a"], example_inputs=torch.randn(4, 5, 5, 3), head="linear", layout="channels_first"
    )
    assert next(iter(program.root.aux.values())).readout.layout.channel_dim == 1


def test_pooling_reads_the_new_position_of_a_permuted_dimension() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 6, 1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = locc.split(torch.relu(self.a(x)).transpose(1, 2), "cut")
            return self.b(x).mean(1)

    program = locc.compile(Permuted(), "dgl", ["cut"], example_inputs=torch.randn(4, 3, 6), head="linear")
    (head,) = program.root.aux.values()
    assert head.readout.layout.kind == "sequence"
