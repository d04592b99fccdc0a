"""`dtp`: the printed program, hand-written oracles, and what is to hold of difference target propagation.

The authors' formulation (donghyunlee/dtp, 0609323, conti_dtp.py): targets in lines 68 to 74, the inverses'
losses in 85 to 90, the modules' in 93 to 100, an epoch in 135 to 137. Ours departs in that it trains all that
there is: their updates leave out W6 and B5 (line 122). The same difference is `DTPLayer.backward` of
meulemansalex/theoretical_framework_for_target_propagation, b6ee350, lib/dtp_layers.py, lines 343 to 364,
whose reconstruction loss (lines 406 to 425) is a mean over units, too, and divided by sigma^2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from examples.models import SmallCNN
from locc.errors import MethodError
from locc.ir import TensorSpec
from locc.rewrite import noise
from locc_passes.target.initial import orthogonal_init
from support import Residual, Tied, batch, close, compiled, mlp, sgd

ETA = 0.3277
SIGMA = 0.3598


def tanh_net(widths: tuple[int, ...] = (4, 7, 6, 5, 3)) -> nn.Sequential:
    """Linear and tanh in every module but the last, which is linear; f64."""
    model = nn.Sequential()
    pairs = list(pairwise(widths))
    for k, (n, m) in enumerate(pairs[:-1], start=1):
        model.add_module(f"f{k}", nn.Sequential(nn.Linear(n, m), nn.Tanh()))
    model.add_module("out", nn.Linear(*pairs[-1]))
    return model.double()


def linear_net(widths: tuple[int, ...] = (6, 6, 6, 6, 3)) -> nn.Sequential:
    """Linear layers alone; f64."""
    model = nn.Sequential()
    for k, (n, m) in enumerate(pairwise(widths), start=1):
        model.add_module(f"f{k}", nn.Linear(n, m))
    return model.double()


def data(size: int = 9, features: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, features, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def fixed_noise(h: Tensor) -> Tensor:
    """Noise that depends on the shape alone, so that a reference can draw it too."""
    return torch.randn(h.shape, generator=torch.Generator().manual_seed(5), dtype=h.dtype)


@pytest.fixture
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_noise(h: Tensor, sigma: float) -> Tensor:
        return h + sigma * fixed_noise(h)

    monkeypatch.setattr(noise, "with_noise", with_noise)


# ---- the program -------------------------------------------------------------------------------


AFTER = """\
# 3 modules: relu1, relu2, third
# phase 'inverses', 1 pass(es) in each epoch, trains: relu2.inverse
# phase 'forward', 1 pass(es) in each epoch, trains: relu1, relu2, third
def step(self, input_1, target):
    # ---- module 0: relu1
    first = self.first(input_1)  # f32[B,8]
    relu1 = self.relu1(first)  # f32[B,8]
    relu1_at_relu1 = stop_gradient(relu1)  # f32[B,8]
    # ---- module 1: relu2
    relu1_at_relu2 = stop_gradient(relu1)  # f32[B,8]
    drop = self.drop(relu1_at_relu2)  # f32[B,8]
    second = self.second(drop)  # f32[B,8]
    relu2 = self.relu2(second)  # f32[B,8]
    noise = with_noise(relu1_at_relu2, 0.3598)  # f32[B,8]
    model_drop = self.drop(noise)  # f32[B,8]
    model_second = self.second(model_drop)  # f32[B,8]
    model_relu2 = self.relu2(model_second)  # f32[B,8]
    relu2_at_relu2 = stop_gradient(relu2)  # f32[B,8]
    # ---- auxiliary: relu2.inverse, learning rate x0.5
    model_relu2_at_relu2_inverse = stop_gradient(model_relu2)  # f32[B,8]
    aux_relu2_inverse = self.aux.relu2_inverse(model_relu2_at_relu2_inverse)  # f32[B,8]
    noise_at_relu2_inverse = stop_gradient(noise)  # f32[B,8]
    reconstruction = squared_distance(aux_relu2_inverse, noise_at_relu2_inverse, 0)  # f32[]
    objective(reconstruction)  # relu2.inverse.reconstruction
    relu2_at_relu2_inverse = stop_gradient(relu2)  # f32[B,8]
    aux_relu2_inverse_2 = self.aux.relu2_inverse(relu2_at_relu2_inverse)  # f32[B,8]
    # ---- module 2: third
    relu2_at_third = stop_gradient(relu2)  # f32[B,8]
    third = self.third(relu2_at_third)  # f32[B,3]
    loss = cross_entropy(third, target)  # f32[]
    objective(loss)  # third.loss
    grad_relu2_at_third = gradient(loss, relu2_at_third)  # f32[B,8]
    # ---- module 1: relu2
    grad_relu2_at_third_at_relu2 = stop_gradient(grad_relu2_at_third)  # f32[B,8]
    target_1 = sub(relu2_at_relu2, grad_relu2_at_third_at_relu2, alpha=0.3277)  # f32[B,8]
    target_1_at_relu2 = stop_gradient(target_1)  # f32[B,8]
    distance = squared_distance(relu2, target_1_at_relu2, 0)  # f32[]
    objective(distance)  # relu2.target
    # ---- auxiliary: relu2.inverse, learning rate x0.5
    target_1_at_relu2_inverse = stop_gradient(target_1)  # f32[B,8]
    aux_relu2_inverse_1 = self.aux.relu2_inverse(target_1_at_relu2_inverse)  # f32[B,8]
    difference = aux_relu2_inverse_1 - aux_relu2_inverse_2  # f32[B,8]
    # ---- module 0: relu1
    difference_at_relu1 = stop_gradient(difference)  # f32[B,8]
    target_2 = relu1_at_relu1 + difference_at_relu1  # f32[B,8]
    target_2_at_relu1 = stop_gradient(target_2)  # f32[B,8]
    distance_1 = squared_distance(relu1, target_2_at_relu1, 0)  # f32[]
    objective(distance_1)  # relu1.target
    return third
"""


def test_the_printed_program() -> None:
    assert str(compiled(mlp(), "dtp", ["relu1", "relu2"], lr_scale=0.5).ir) == AFTER


def test_first_and_last_module_have_no_inverse() -> None:
    program = compiled(tanh_net(), "dtp", ["f1", "f2", "f3"])
    assert [o.name for o in program.ir.owners.values() if o.auxiliary] == ["f2.inverse", "f3.inverse"]
    program = compiled(tanh_net(), "dtp", ["f1"])
    assert list(program.ir.owners) == ["f1", "output"]
    assert program.phases == ()


# ---- oracles -----------------------------------------------------------------------------------


class Reference:
    """Difference target propagation on a chain, by hand: layers f_1..f_Q, inverses {k: g_k}, SGD."""

    def __init__(self, layers: list[nn.Module], inverses: dict[int, nn.Module], rate: float) -> None:
        self.layers, self.inverses, self.rate = layers, inverses, rate

    def activations(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for layer in self.layers:
            found.append(layer(found[-1].detach()))
        return found

    def targets(self, h: list[Tensor], y: Tensor) -> dict[int, Tensor]:
        last = len(self.layers)
        top = h[last - 1].detach().requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(self.layers[-1](top), y), top)
        found = {last - 1: h[last - 1].detach() - ETA * slope}
        for k in range(last - 1, 1, -1):
            g = self.inverses[k]
            with torch.no_grad():
                found[k - 1] = h[k - 1] + g(found[k]) - g(h[k])
        return found

    def forward_losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        h = self.activations(x)
        targets = self.targets(h, y)
        losses = [((h[k] - targets[k]) ** 2).sum(1).mean() for k in range(1, len(self.layers))]
        return [*losses, nn.functional.cross_entropy(h[-1], y)]

    def inverse_losses(self, x: Tensor) -> list[Tensor]:
        h = self.activations(x)
        losses = []
        for k, g in self.inverses.items():
            noisy = (h[k - 1] + SIGMA * fixed_noise(h[k - 1])).detach()
            above = self.layers[k - 1](noisy).detach()
            losses.append(((g(above) - noisy) ** 2).sum(1).mean())
        return losses

    def step(self, x: Tensor, y: Tensor, phase: str | None) -> None:
        total = torch.zeros((), dtype=x.dtype)
        if phase != "inverses":
            total = total + torch.stack(self.forward_losses(x, y)).sum()
        if phase != "forward":
            total = total + torch.stack(self.inverse_losses(x)).sum()
        held = [p for m in (*self.layers, *self.inverses.values()) for p in m.parameters()]
        slopes = torch.autograd.grad(total, held, allow_unused=True)
        with torch.no_grad():
            for p, slope in zip(held, slopes, strict=True):
                if slope is not None:
                    p -= self.rate * slope


@pytest.mark.parametrize("phases", [(None,) * 4, ("inverses", "inverses", "forward", "forward", "inverses")])
def test_steps_equal_the_formulas(known_noise: None, phases: tuple[str | None, ...]) -> None:
    model = tanh_net()
    x, y = data()
    program = compiled(model, "dtp", ["f1", "f2", "f3"], optimizer=sgd(0.3), example_inputs=x)
    inverses = {2: program.root.aux["f2_inverse"], 3: program.root.aux["f3_inverse"]}
    other, copies = copy.deepcopy(model), copy.deepcopy(inverses)
    reference = Reference(list(other), copies, 0.3)
    for phase in phases:
        program.phase = phase
        report = program.step(x, y)
        if phase == "inverses":
            expected = reference.inverse_losses(x)
            assert list(report.objectives) == ["f2.inverse.reconstruction", "f3.inverse.reconstruction"]
            for found, loss in zip(report.objectives.values(), expected, strict=True):
                assert abs(float(found - loss.detach())) < 1e-10
        reference.step(x, y, phase)
        close(model, other)
        for k, g in inverses.items():
            close(g, copies[k])


def test_several_readers_add_their_differences(known_noise: None) -> None:
    """Residual connections: `inp` is read by two modules, `blocks.0` sends two values."""
    model = Residual(blocks=2).double()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, "dtp", ["inp", "blocks.0"], optimizer=sgd(1.0))
    before = copy.deepcopy(model)
    aux = program.root.aux
    assert set(aux) == {"blocks_0_inverse"}
    g = aux["blocks_0_inverse"]
    h = before.inp(x)
    block = before.blocks[0](h.detach())
    leaves = [v.detach().requires_grad_() for v in (h, block)]
    state = leaves[0] + leaves[1]
    loss = nn.functional.cross_entropy(before.out(state + before.blocks[1](state) + leaves[0]), y)
    to_inp, to_block = torch.autograd.grad(loss, leaves, retain_graph=True)
    block_target = block.detach() - ETA * to_block
    with torch.no_grad():
        inp_target = h - ETA * to_inp + g(block_target) - g(block)
    total = loss + ((h - inp_target) ** 2).sum(1).mean() + ((block - block_target) ** 2).sum(1).mean()
    total.backward()
    program.phase = "forward"
    program.step(x, y)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert q.grad is not None
        assert float(q.grad.abs().max()) > 0, name
        assert torch.allclose(q - p, q.grad, rtol=0, atol=1e-10), name


def test_an_inverse_reads_every_value_that_its_module_sends(known_noise: None) -> None:
    class Two(nn.Module):
        """Its second module, `both`, sends two values."""

        def __init__(self) -> None:
            super().__init__()
            self.a, b, c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(5, 3)
            self.both = nn.ModuleList([nn.Sequential(b, nn.Tanh()), c])
            self.d, self.e = nn.Linear(6, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            b, c = (branch(a) for branch in self.both)
            return self.d(b) + self.e(c)

    model = Two().double()
    x, y = batch(dtype=torch.float64)
    program = compiled(model, "dtp", ["a", "both"], optimizer=sgd(1.0))
    before, g = copy.deepcopy(model), copy.deepcopy(program.root.aux["both_inverse"])
    a = before.a(x).detach()
    sent = [branch(a) for branch in before.both]
    leaves = [v.detach().requires_grad_() for v in sent]
    loss = nn.functional.cross_entropy(before.d(leaves[0]) + before.e(leaves[1]), y)
    slopes = torch.autograd.grad(loss, leaves)
    moved = [v.detach() - ETA * s for v, s in zip(sent, slopes, strict=True)]
    maps = [part.map.linear for part in g.parts]
    with torch.no_grad():
        target = a + sum(m(v) for m, v in zip(maps, moved, strict=True))
        target = target - sum(m(v.detach()) for m, v in zip(maps, sent, strict=True))
    ((before.a(x) - target) ** 2).sum(1).mean().backward()
    noisy = a + SIGMA * fixed_noise(a)
    above = [branch(noisy).detach() for branch in before.both]
    rebuilt = maps[0](above[0]) + maps[1](above[1])
    ((rebuilt - noisy.detach()) ** 2).sum(1).mean().backward()
    program.step(x, y)
    for (name, p), q in zip(program.root.aux["both_inverse"].named_parameters(), g.parameters(), strict=True):
        assert q.grad is not None
        assert torch.allclose(q - p, q.grad, rtol=0, atol=1e-10), name
    for p, q in zip(model.a.parameters(), before.a.parameters(), strict=True):
        assert q.grad is not None
        assert torch.allclose(q - p, q.grad, rtol=0, atol=1e-10)


# ---- conformance and pitfalls ------------------------------------------------------------------


def matched(
    model: nn.Sequential, weight: Callable[[nn.Linear], tuple[Tensor, Tensor]]
) -> Callable[..., nn.Module]:
    """A factory that hands out inverses of the interior layers f2, f3, ... in turn."""
    waiting = list(model)[1:-1]

    def factory(output: TensorSpec, read: TensorSpec) -> nn.Module:
        w, b = weight(waiting.pop(0))
        made = nn.Linear(w.shape[1], w.shape[0]).to(w.dtype)
        with torch.no_grad():
            made.weight.copy_(w)
            made.bias.copy_(b)
        return made

    return factory


def transposed(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().T, torch.zeros(layer.in_features)


def exact(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    inverse = torch.linalg.inv(layer.weight.detach())
    return inverse, -inverse @ layer.bias.detach()


def moves(model: nn.Sequential, method: str, x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    """How far one forward step of SGD(1) moves each parameter."""
    start = copy.deepcopy(model)
    used = copy.deepcopy(model)
    program = compiled(used, method, ["f1", "f2", "f3"], optimizer=sgd(1.0), example_inputs=x, **options)
    if program.phases:
        program.phase = "forward"
    program.step(x, y)
    return [(p - q).detach() for p, q in zip(start.parameters(), used.parameters(), strict=True)]


def test_orthogonal_layers_with_transposed_inverses_move_along_bp() -> None:
    model = orthogonal_init(linear_net())
    assert isinstance(model, nn.Sequential)
    x, y = data(features=6)
    local = moves(model, "dtp", x, y, factory=matched(model, transposed))
    bp = moves(model, "bp", x, y)
    scale = 2 * ETA / len(x)
    for found, wanted in zip(local[:-2], bp[:-2], strict=True):
        assert float(wanted.abs().max()) > 1e-4
        assert torch.allclose(found, scale * wanted, rtol=0, atol=1e-10)
    for found, wanted in zip(local[-2:], bp[-2:], strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_exact_inverses_make_dtp_and_tp_equal() -> None:
    model = linear_net()
    x, y = data(features=6)
    a = moves(model, "dtp", x, y, factory=matched(model, exact))
    b = moves(model, "tp", x, y, factory=matched(model, exact), eta=ETA)
    assert all(torch.allclose(p, q, rtol=0, atol=1e-10) for p, q in zip(a, b, strict=True))
    c = moves(model, "tp", x, y, factory=matched(model, transposed), eta=ETA)
    assert not torch.allclose(a[0], c[0], atol=1e-3)


def test_noise_is_fresh_has_scale_sigma_and_leaves_batch_norm_alone() -> None:
    draws = []
    h = torch.zeros(200, 50)
    for seed in range(2):
        torch.manual_seed(seed)
        draws.append(noise.with_noise(h, 0.25))
    assert not torch.equal(*draws)
    assert abs(float(draws[0].std()) - 0.25) < 0.01

    model = SmallCNN(4)
    twin = copy.deepcopy(model)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    program = compiled(model, "dtp", ["layer1", "layer2", "layer3"], example_inputs=x)
    first, second = (program.step(x, y).objectives["layer2.inverse.reconstruction"] for _ in range(2))
    assert float(first) != float(second)
    twin(x)
    program = compiled(model := SmallCNN(4), "dtp", ["layer1", "layer2", "layer3"], example_inputs=x)
    twin = copy.deepcopy(model)
    program.step(x, y)
    twin(x)
    for name, buffer in twin.named_buffers():
        assert torch.allclose(dict(model.named_buffers())[name], buffer, atol=1e-6), name


def test_values_of_ended_range_get_inverses_of_that_range() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
            self.b, self.c = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.ReLU())
            self.d, self.e = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.e(self.d(self.c(torch.sigmoid(self.b(self.a(x))))))

    program = compiled(Mixed(), "dtp", ["a", "b", "c", "d"])
    # The sigmoid is the first operation of module c, so what c reads is b's own, linear, output.
    wide = 9 * torch.randn(50, 5)
    with torch.no_grad():
        ranges = {name: float(net(wide).abs().max()) for name, net in program.root.aux.items()}
    assert ranges["b_inverse"] <= 1 < min(ranges["c_inverse"], ranges["d_inverse"])
    program = compiled(Mixed(), "dtp", ["a", "b", "c", "d"], activation="sigmoid")
    with torch.no_grad():
        assert all(float((net(wide) - 0.5).abs().max()) <= 0.5 for net in program.root.aux.values())


def test_inverses_start_with_unit_singular_values_unless_told() -> None:
    program = compiled(tanh_net(), "dtp", ["f1", "f2", "f3"], example_inputs=data()[0])
    for net in program.root.aux.values():
        values = torch.linalg.svdvals(net.map.linear.weight)
        assert torch.allclose(values, torch.ones_like(values))
        assert not net.map.linear.bias.any()
    program = compiled(tanh_net(), "dtp", ["f1", "f2", "f3"], example_inputs=data()[0], init="pytorch")
    assert all(net.map.linear.bias.any() for net in program.root.aux.values())


def test_orthogonal_init() -> None:
    model = orthogonal_init(tanh_net())
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        else:
            values = torch.linalg.svdvals(p)
            assert torch.allclose(values, torch.ones_like(values))
    with pytest.raises(MethodError, match=r"no nn\.Linear"):
        orthogonal_init(nn.Tanh())


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.0}, "eta"),
        ({"sigma": 0.0}, "without noise no inverse is learned"),
        ({"order": "epochs"}, "nearest: 'epoch'"),
        ({"init": "orthogonale"}, "nearest: 'orthogonal'"),
        ({"activation": "tan"}, "nearest: 'tanh'"),
        ({"lr_scale": -1.0}, "lr_scale"),
        ({"etta": 1.0}, "nearest: 'eta'"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        compiled(mlp(), "dtp", ["relu1", "relu2"], **options)


def test_an_inverse_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MethodError, match=r"inverse of module 'relu2' for f32\[B,8\] gives shape"):
        compiled(mlp(), "dtp", ["relu1", "relu2"], factory=lambda output, read: nn.Linear(8, 9))


def test_an_inverse_that_cannot_be_built_names_its_module() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)[:, None, None, None, None]
            return self.c(self.b(x)[:, 0, 0, 0, 0])

    with pytest.raises(MethodError, match=r"module 'b': .* has no known layout"):
        compiled(Deep(), "dtp", ["a", "b"])


# ---- models ------------------------------------------------------------------------------------


def test_a_lent_parameter_also_gets_the_borrowers_gradient() -> None:
    tokens = torch.randint(11, (4, 7))
    model = Tied()
    program = locc.compile(
        model, "dtp", ["embed", "mid"], example_inputs=tokens, tied="owner", optimizer=sgd(1.0)
    )
    before = copy.deepcopy(model)
    embedded = before.embed(tokens)
    mid = before.mid(embedded.detach())
    top = mid.detach().requires_grad_()
    loss = nn.functional.cross_entropy(
        (torch.tanh(top) @ before.head.weight.T).flatten(0, 1), tokens.flatten()
    )
    (slope,) = torch.autograd.grad(loss, top, retain_graph=True)
    g = program.root.aux["mid_inverse"]
    with torch.no_grad():
        target = embedded + g(mid - ETA * slope) - g(mid)
    (loss + ((embedded - target) ** 2).sum((1, 2)).mean()).backward()
    program.phase = "forward"
    program.step(tokens, tokens)
    grad = before.embed.weight.grad
    assert grad is not None
    assert torch.allclose(before.embed.weight - model.embed.weight, grad, atol=1e-6)
