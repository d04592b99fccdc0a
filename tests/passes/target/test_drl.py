"""`dtp-drl`, `ddtp-linear`, `ddtp-rhl`: the formulas in NumPy, the authors' numbers, and what is to hold.

The authors' formulation (meulemansalex/theoretical_framework_for_target_propagation, b6ee350): the loss is
`DTPDRLLayer.compute_feedback_gradients` (lib/dtpdrl_layers.py, lines 27 to 57); the way to the output and
back is `compute_feedback_gradients` and `propagate_backward` of `DTPDRLNetwork` (lib/networks.py), for direct
maps of `DDTPRHLNetwork` (lib/direct_feedback_networks.py). Ours departs in two places: a linear feedback
layer has no bias at all, since it cancels; and a single module trains on the loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import locc
from locc.errors import MethodError
from locc.rewrite import noise
from locc.testing import Case, ModelSpec
from support import Residual, compiled, same, sgd, snapshot

Array = NDArray[np.float64]
METHODS = ("dtp-drl", "ddtp-linear", "ddtp-rhl")
GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden"
DEPTH = 4


# ---- the rules, in NumPy --------------------------------------------------------------------------


class Rule:
    """Four layers, tanh after the first three; `p` holds W1.., b1.., feedbackK.weight, .bias, shared.*."""

    def __init__(self, method: str, p: dict[str, Array], eta: float, sigma: float) -> None:
        self.method, self.p, self.eta, self.sigma = method, p, eta, sigma
        self.direct = method != "dtp-drl"

    def layer(self, k: int, h: Array) -> Array:
        a = h @ self.p[f"W{k}"].T + self.p.get(f"b{k}", 0.0)
        return np.asarray(a if k == DEPTH else np.tanh(a))

    def g(self, k: int, v: Array) -> Array:
        z = v @ self.p[f"feedback{k}.weight"].T + self.p.get(f"feedback{k}.bias", 0.0)
        return np.asarray(z if self.method == "ddtp-linear" else np.tanh(z))

    def read(self, k: int, a: Array) -> Array:
        """What the direct map of layer k reads of the output."""
        if self.method == "ddtp-linear" or k == DEPTH - 1:
            return a
        return np.asarray(np.tanh(a @ self.p["shared.weight"].T + self.p["shared.bias"]))

    def down(self, h: list[Array], moved: Array, lowest: int) -> dict[int, Array]:
        """What a moved output makes of the layers down to `lowest`."""
        found = {DEPTH: moved}
        for k in range(DEPTH - 1, lowest - 1, -1):
            if self.direct:
                found[k] = h[k] + self.g(k, self.read(k, moved)) - self.g(k, self.read(k, h[DEPTH]))
            else:
                found[k] = h[k] + self.g(k + 1, found[k + 1]) - self.g(k + 1, h[k + 1])
        return found

    def gradients(self, x: Array, y: Any, noises: dict[int, Array]) -> dict[str, Array]:
        """The gradient of each parameter; `noises[k]` is the standard normal noise on layer k."""
        h = [x]
        for k in range(1, DEPTH + 1):
            h.append(self.layer(k, h[-1]))
        p = np.exp(h[DEPTH] - h[DEPTH].max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(p.shape[1])[y]) / len(x)
        targets = self.down(h, h[DEPTH] - self.eta * error, 1)
        found = {}
        for k in range(1, DEPTH + 1):
            delta = 2 * (h[k] - targets[k]) / len(x) * (1.0 if k == DEPTH else 1 - h[k] ** 2)
            found[f"W{k}"], found[f"b{k}"] = delta.T @ h[k - 1], delta.sum(0)
        for k in range(1, DEPTH):
            e = self.sigma * noises[k]
            moved = h[k] + e
            for above in range(k + 1, DEPTH + 1):
                moved = self.layer(above, moved)
            name = f"feedback{k if self.direct else k + 1}"
            if self.direct:
                there, here = self.read(k, moved), self.read(k, h[DEPTH])
            else:
                there, here = self.down(h, moved, k + 1)[k + 1], h[k + 1]
            g_there, g_here = self.g(int(name[-1]), there), self.g(int(name[-1]), here)
            delta = 2 * (g_there - g_here - e) / (self.sigma**2 * e.size)
            flat = self.method == "ddtp-linear"
            one = delta * (1.0 if flat else 1 - g_there**2)
            two = delta * (1.0 if flat else 1 - g_here**2)
            found[f"{name}.weight"], found[f"{name}.bias"] = one.T @ there - two.T @ here, (one - two).sum(0)
        return {name: value for name, value in found.items() if name in self.p}


def network(p: dict[str, Array]) -> nn.Sequential:
    model = nn.Sequential()
    for k in range(1, DEPTH + 1):
        rows, columns = p[f"W{k}"].shape
        layer = nn.Linear(columns, rows, bias=f"b{k}" in p).double()
        model.add_module(f"f{k}", layer if k == DEPTH else nn.Sequential(layer, nn.Tanh()))
    return model


def tensors(program: locc.Program, method: str) -> dict[str, Tensor]:
    """The parameters and fixed matrices of a program, by the names of `Rule`."""
    held = {}
    for k, layer in enumerate((m for m in program.model.modules() if isinstance(m, nn.Linear)), start=1):
        held[f"W{k}"] = layer.weight
        if layer.bias is not None:
            held[f"b{k}"] = layer.bias
    for key, network in program.root.aux.items():
        if key == "hidden_feedback":
            held["shared.weight"], held["shared.bias"] = network.weight, network.bias
            continue
        # The inverse of the last module is named after the output.
        number = key[1] if key[0] == "f" else str(DEPTH)
        held.update({f"feedback{number}.{n.split('.')[-1]}": p for n, p in network.named_parameters()})
    return held


def matrix(network: nn.Module) -> Tensor:
    """The weight of a feedback network."""
    (weight,) = (p for name, p in network.named_parameters() if name.endswith("weight"))
    return weight


def program_of(
    method: str, p: dict[str, Array], x: Array, noises: dict[int, Array], monkeypatch: Any, **options: Any
) -> locc.Program:
    """Compile the network of some parameters, with known noise: layers are told apart by their widths."""
    monkeypatch.setattr(
        noise,
        "gaussian",
        lambda h, sigma: sigma * next(torch.tensor(n) for n in noises.values() if n.shape == tuple(h.shape)),
    )
    if method == "ddtp-rhl":
        options["hidden"] = len(p["shared.bias"])
    program = compiled(network(p), method, ["f1", "f2", "f3"], example_inputs=torch.tensor(x), **options)
    held = tensors(program, method)
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(torch.tensor(p[name]))
    return program


@pytest.mark.parametrize("method", METHODS)
def test_the_authors_numbers(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = GOLDEN / f"{method}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    golden = dict(np.load(path))
    x, y, eta, sigma = golden["x"], golden["labels"], float(golden["eta"]), float(golden["sigma"])
    p = {n: v for n, v in golden.items() if n[0] in "Wb" or n.startswith(("feedback", "shared"))}
    if method == "ddtp-linear":  # their bias cancels
        p = {n: v for n, v in p.items() if not n.startswith("feedback") or n.endswith("weight")}
    layer = 0 if method != "dtp-drl" else 1
    noises = {k - layer: golden[f"noise{k}"] for k in range(1 + layer, DEPTH + layer)}
    program = program_of(method, p, x, noises, monkeypatch, optimizer=sgd(1.0), eta=eta, sigma=sigma)
    before = {n: t.detach().clone() for n, t in tensors(program, method).items()}
    report = program.step(torch.tensor(x), torch.tensor(y))
    after = tensors(program, method)
    rule = Rule(method, p, eta, sigma).gradients(x, y, noises)
    trained = [n for n in after if not n.startswith("shared")]
    assert set(trained) == set(rule)
    for name in trained:
        wanted = golden[f"grad.{name}"]
        moved = (before[name] - after[name]).detach().numpy()
        np.testing.assert_allclose(rule[name], wanted, rtol=1e-9, atol=1e-14, err_msg=name)
        # The difference of two rounded weights resolves 1e-16 of the weight.
        np.testing.assert_allclose(moved, wanted, rtol=1e-9, atol=3e-16 * np.abs(p[name]).max(), err_msg=name)
    owners = {"dtp-drl": {2: "f2.inverse", 3: "f3.inverse", 4: "f4.inverse"}}.get(
        method, {k: f"f{k}.feedback" for k in (1, 2, 3)}
    )
    for k, owner in owners.items():
        found = float(report.objectives[f"{owner.replace('f4', program.ir.last.name)}.reconstruction"])
        assert found == pytest.approx(float(golden[f"reconstruction{k}"]), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_steps_equal_the_formulas(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps, each from what the one before has left, with weight decay on the feedback."""
    random, widths, n = np.random.default_rng(5), (5, 7, 6, 8, 3), 9
    p: dict[str, Array] = {}
    for k in range(1, DEPTH + 1):
        p[f"W{k}"], p[f"b{k}"] = (
            random.normal(size=(widths[k], widths[k - 1])) / 2,
            random.normal(size=widths[k]),
        )
    for k in range(1, DEPTH) if method != "dtp-drl" else range(2, DEPTH + 1):
        to = widths[k] if method != "dtp-drl" else widths[k - 1]
        start = widths[k] if method == "dtp-drl" else 10 if method == "ddtp-rhl" and k < DEPTH - 1 else 3
        p[f"feedback{k}.weight"] = random.normal(size=(to, start)) / 3
        if method != "ddtp-linear":
            p[f"feedback{k}.bias"] = random.normal(size=to) / 3
    if method == "ddtp-rhl":
        p["shared.weight"], p["shared.bias"] = random.normal(size=(10, 3)), random.normal(size=10)
    noises = {k: random.normal(size=(n, widths[k])) for k in range(1, DEPTH)}
    x = random.normal(size=(n, widths[0]))
    program = program_of(
        method, p, x, noises, monkeypatch, eta=0.4, sigma=0.3,
        optimizer=lambda held: torch.optim.SGD(held, lr=0.2, weight_decay=0.01),
    )  # fmt: skip
    for _ in range(3):
        y = random.integers(0, 3, n)
        program.step(torch.tensor(x), torch.tensor(y))
        slopes = Rule(method, p, 0.4, 0.3).gradients(x, y, noises)
        p.update({name: p[name] - 0.2 * (slope + 0.01 * p[name]) for name, slope in slopes.items()})
        for name, found in tensors(program, method).items():
            np.testing.assert_allclose(found.detach().numpy(), p[name], rtol=0, atol=1e-10, err_msg=name)


def test_several_returns_share_what_they_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    """`inp` is read by two modules: its noise reaches the output on two ways, and two inverses undo it."""
    e = 0.2 * torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    monkeypatch.setattr(noise, "gaussian", lambda h, sigma: e[: len(h)] if len(h) == 9 else h * sigma)
    model = Residual(blocks=2).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    options: dict[str, Any] = {"sigma": 0.2, "eta": 0.5, "activation": "linear"}
    program = compiled(model, "dtp-drl", ["inp", "blocks.0"], optimizer=sgd(1.0), example_inputs=x, **options)
    block, straight, top = (
        matrix(program.root.aux[name])
        for name in ("blocks_0_inverse", "output_inverse_inp", "output_inverse_blocks_0")
    )
    weights = [block, straight, model.inp.weight]
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():

        def head(h: Tensor, b: Tensor) -> Tensor:
            return model.out(h + b + model.blocks[1](h + b) + h)

        h = model.inp(x)
        b, b_noisy = model.blocks[0](h), model.blocks[0](h + e)
        z, z_noisy = head(h, b), head(h + e, b_noisy)
        at_z, at_b = z_noisy - z, (z_noisy - z) @ top.T
        rest = 2 / (0.2**2 * 54) * (at_b @ block.T + at_z @ straight.T - e)
        step = -0.5 * (z.softmax(1) - nn.functional.one_hot(y, 3)) / 9
        missed = -2 / 9 * (step @ top.T @ block.T + step @ straight.T)
        wanted = [rest.T @ at_b, rest.T @ at_z, missed.T @ x]
    program.step(x, y)
    for w, old, slope in zip(weights, before, wanted, strict=True):
        assert float(slope.abs().max()) > 1e-3
        assert torch.allclose(old - w, slope, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("method", "below"), [("ddtp-linear", 2), ("ddtp-linear", 1), ("dtp-drl", 2)])
def test_the_optimum_is_the_damped_pseudo_inverse(
    method: str, below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q = J' (J J' + d w / 2 I)^-1, J from a linear layer of d units to the output, w the weight decay."""
    model = nn.Sequential(*(nn.Linear(n, m) for n, m in ((5, 7), (7, 6), (6, 3)))).double()
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    white = torch.linalg.qr(torch.randn(12, 7, dtype=torch.float64))[0] * 12**0.5
    monkeypatch.setattr(
        noise, "gaussian", lambda h, s: s * white[: len(h), : h.shape[1]] if len(h) == 12 else h
    )
    decay = 0.05
    program = compiled(
        model, method, ["0", "1"], example_inputs=x,
        optimizer=lambda held: torch.optim.SGD(held, lr=0.5, weight_decay=decay),
    )  # fmt: skip
    names = {"dtp-drl": "2_inverse", "ddtp-linear": f"{below - 1}_feedback"}
    q = matrix(program.root.aux[names[method]])
    jacobian = model[2].weight.detach() @ (model[1].weight.detach() if below == 1 else torch.eye(6).double())
    d = jacobian.shape[1]
    best = torch.linalg.solve(
        jacobian @ jacobian.T + d * decay / 2 * torch.eye(3).double(), jacobian
    ).T  # fmt: skip
    program.phase = "warmup"
    program.step(x, y)
    assert float((q - best).detach().abs().max()) > 0.01
    with torch.no_grad():
        q.copy_(best)
    program.step(x, y)
    assert torch.allclose(q, best, rtol=0, atol=1e-12)


def test_phases_train_the_feedback_alone_before_and_between() -> None:
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    program = compiled(model, "ddtp-rhl", ["1", "3"], example_inputs=x, warmup=2, hidden=8)
    before, fixed = snapshot(model), snapshot(program.root.aux["hidden_feedback"])
    history = program.fit([(x, y)], epochs=1, progress=False)
    assert [e.phase for e in history.epochs] == ["warmup", "warmup", "train", "feedback"]
    assert same(fixed, snapshot(program.root.aux["hidden_feedback"]))
    assert not same(before, snapshot(model))
    before, feedback = snapshot(model), snapshot(program.root.aux)
    program.phase = "feedback"
    program.step(x, y)
    after = snapshot(program.root.aux)
    assert same(before, snapshot(model))
    assert all(("hidden" in key) == torch.equal(feedback[key], after[key]) for key in after)
    assert compiled(model, "dtp-drl", ["1", "3"], example_inputs=x, warmup=0, extra=0).phases == ()


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("dtp-drl", {"eta": 0}, "eta=0: give a number above 0"),
        ("ddtp-linear", {"warmup": -1}, "warmup=-1: give a number of passes"),
        ("ddtp-rhl", {"hidden": 0}, "hidden=0: give a width"),
        ("dtp-drl", {"activation": "tan"}, "activation='tan'; nearest: 'tanh'"),
    ],
)
def test_unusable_options_are_refused(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        compiled(nn.Linear(4, 3), method, **options)


def test_a_module_that_the_prediction_does_not_need_is_refused() -> None:
    case = Case(ModelSpec("auxiliary"), "ddtp-linear", splits=3)
    with pytest.raises(MethodError, match="'head' is not computed from what module 'side' sends"):
        case.compile()
