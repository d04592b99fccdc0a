"""bcd2, bcd3, admm and dladmm: against their equations, their authors' numbers, and what they promise.

Where the authors' code is found, and where ours departs from it, is said in oracles.py.
"""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import locc
from locc.errors import MethodError
from locc_passes.auxiliary_variables.formulas import fitted_input, fitted_weight
from locc_passes.auxiliary_variables.products import Bend, product_of
from passes.auxiliary_variables import oracles
from support import same, snapshot

D = torch.float64
GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden"
METHODS = ["admm", "bcd2", "bcd3", "dladmm"]
WIDTHS = (9, 8, 11, 7, 4)


def mlp(widths=WIDTHS, activation=nn.ReLU):
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).to(D)


def batch(size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, WIDTHS[0], generator=generator, dtype=D)
    return x, torch.randint(0, WIDTHS[-1], (size,), generator=generator)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def oracle_of(model, x, y):
    weights = [m.weight.detach().numpy().copy() for m in layers_of(model)]
    biases = [m.bias.detach().numpy()[:, None].copy() for m in layers_of(model)]
    return oracles.Net(weights, biases, x.numpy().T, np.eye(weights[-1].shape[0])[y.numpy()].T)


def held(program, name):
    return program.root.get_submodule(f"aux.{name}").value


def agrees(program, net, pre, post, upto, tolerance=1e-10):
    for i, layer in enumerate(layers_of(program.model), start=1):
        pairs = [(layer.weight.detach(), net.W[i]), (layer.bias.detach()[:, None], net.b[i])]
        pairs += [(held(program, f"{pre}{i}").T, net.U[i])] if pre else []
        pairs += [(held(program, f"{post}{i}").T, net.V[i])] if i <= upto else []
        for found, wanted in pairs:
            np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=tolerance)


def rule(method, net):
    """Return what makes one step of the method on a network."""
    if method == "dladmm":
        return oracles.DLADMM(net, 0.1).step
    if method == "admm":
        return oracles.ADMM(net, sweeps=4, warm=6).step
    return lambda: getattr(oracles, method)(net)


@pytest.mark.parametrize("method", METHODS)
def test_against_the_equations(method):
    """Three steps on one batch, which continue, and one on another, which begins anew."""
    model = mlp(activation=lambda: nn.ReLU(inplace=True))
    x, y = batch()
    options = {"sweeps": 4} if method == "admm" else {}
    program = locc.compile(model, method, ["1", "3", "4"], example_inputs=x, verify=False, **options)
    net = oracle_of(model, x, y)
    step = rule(method, net)
    pre, post = {"bcd3": ("U", "V"), "bcd2": ("", "V")}.get(method, ("z", "a"))
    upto = 4 if method.startswith("bcd") else 3
    for _ in range(3):
        program.step(x, y)
        step()
        agrees(program, net, pre, post, upto)
    x, y = batch(seed=1)
    net = oracle_of(model, x, y)
    program.step(x, y)
    rule(method, net)()
    agrees(program, net, pre, post, upto)


@pytest.mark.parametrize(
    ("method", "options", "letters", "steps"),
    [
        ("bcd3", {"old_weight": True}, "UV", {1: "sweep1", 3: "sweep3"}),
        ("dladmm", {}, "za", {1: "iteration1", 3: "iteration3"}),
    ],
)
def test_the_numbers_of_the_authors_code(method, options, letters, steps):
    path = GOLDEN / f"{method}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    golden = dict(np.load(path))
    depth = sum(name.startswith("start.W") for name in golden)
    widths = [golden["x"].shape[1], *(len(golden[f"start.W{i}"]) for i in range(1, depth + 1))]
    model = mlp(widths)
    for i, layer in enumerate(layers_of(model), start=1):
        layer.weight.data = torch.tensor(golden[f"start.W{i}"])
        layer.bias.data = torch.tensor(golden[f"start.b{i}"][:, 0])
    x, y = torch.tensor(golden["x"]), torch.tensor(golden["labels"])
    if "rho" in golden:
        options = {"rho": float(golden["rho"])}
    program = locc.compile(model, method, ["1", "3"], example_inputs=x, verify=False, **options)
    for number in range(1, 4):
        program.step(x, y)
        if number not in steps:
            continue
        found = {f"{k}{i}": held(program, f"{k}{i}").T for k in letters for i in range(1, depth)}
        found |= {f"W{i}": m.weight for i, m in enumerate(layers_of(model), start=1)}
        found |= {f"b{i}": m.bias[:, None] for i, m in enumerate(layers_of(model), start=1)}
        for name, value in found.items():
            wanted = golden[f"{steps[number]}.{name}"]
            np.testing.assert_allclose(
                value.detach().numpy(), wanted, rtol=0, atol=1e-9 * abs(wanted).max(), err_msg=name
            )


def convolutional(activation=nn.ReLU):
    """A strided and a grouped convolution, pooling, flattening, a layer without bias."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        activation(),
        nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False),
        activation(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).to(D)


def objective(program, x, y, method, gamma=1.0, rho=1.0):
    """F of a program's weights and variables, written without locc's products."""
    model, v, total, number = program.model, x, 0.0, 0
    groups, current = [], []
    for layer in model:
        if layers_of(layer) and any(layers_of(m) for m in current):
            groups.append(current)
            current = []
        current.append(layer)
    groups.append(current)
    hot = nn.functional.one_hot(y, 4).to(D)
    for number, group in enumerate(groups, start=1):
        at = next(i for i, m in enumerate(group) if layers_of(m))
        bent = next(
            (i for i, m in enumerate(group) if i > at and not isinstance(m, (nn.AvgPool2d, nn.Flatten))), None
        )
        u = nn.Sequential(*group[: at + 1])(v)
        sigma = group[bent] if bent is not None else nn.Identity()
        rest = nn.Sequential(*group[(at if bent is None else bent) + 1 :])
        after = held(program, f"V{number}")
        if method == "bcd3":
            own = held(program, f"U{number}")
            total += rho / 2 * (own - u).square().sum()
            u = own
        total += gamma / 2 * (after - sigma(u)).square().sum()
        v = rest(after)
    return float(total + (v - hot).square().sum() / 2)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("build", [mlp, convolutional])
@pytest.mark.parametrize("method", ["bcd2", "bcd3"])
def test_the_objective_never_rises(method, build, activation):
    """METHODS.md section H, 7."""
    model = build(activation=activation)
    _, y = batch(30)
    x = batch(30)[0] if build is mlp else torch.randn(30, 2, 8, 8, dtype=D)
    few = {"rounds": 3} if method == "bcd3" else {"rounds": 2, "steps": 2}
    program = locc.compile(model, method, 3, example_inputs=x, verify=False, **few)
    values = []
    for _ in range(8):
        program.step(x, y)
        with torch.no_grad():
            values.append(objective(program, x, y, method))
    assert all(b < a for a, b in itertools.pairwise(values)), values
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("method", METHODS)
def test_cuts_decide_who_owns_and_nothing_else(method):
    """Cut before and after a nonlinearity, or not at all, on convolutions."""
    x, y = torch.randn(10, 2, 8, 8, dtype=D), torch.randint(4, (10,))
    model, found = convolutional(), []
    few = {"bcd2": {"rounds": 2, "steps": 1}, "bcd3": {"rounds": 2}, "admm": {"rounds": 2, "sweeps": 2}}
    for splits in ([], ["0", "3"]):
        program = locc.compile(
            copy.deepcopy(model), method, splits, example_inputs=x, verify=False, **few.get(method, {})
        )
        for _ in range(2):
            program.step(x, y)
        found.append(snapshot(program.model))
    assert same(*found)
    assert not same(found[0], snapshot(model))


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, nn.ELU(), nn.functional.gelu])
def test_the_search_of_a_nonlinearity_finds_a_minimum(function):
    a, b, start = torch.randn(3, 500, dtype=D)
    u = Bend(function, None).prox(a, b, 6.0, start)
    grid = torch.linspace(-6, 6, 4001, dtype=D)[:, None]
    best = ((function(grid) - a) ** 2 + 6 * (grid - b) ** 2).amin(0)
    assert float(((function(u) - a) ** 2 + 6 * (u - b) ** 2 - best).max()) < 1e-4


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h + x * h)


LINEAR, TWIN = nn.Linear(9, 9), nn.Linear(9, 9)
TWIN.weight = LINEAR.weight


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
            r"'1' \(BatchNorm1d\) is no",
        ),
        (
            nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4)),
            r"'2' \(Dropout\) draws a mask",
        ),
        (nn.Sequential(LINEAR, nn.ReLU(), LINEAR, nn.Linear(9, 4)), "of '0' is used twice"),
        (nn.Sequential(LINEAR, nn.ReLU(), TWIN, nn.Linear(9, 4)), "of '0' is used twice .by '2'"),
        (nn.Sequential(nn.Linear(9, 8), nn.PReLU(), nn.Linear(8, 4)), r"'1' \(PReLU\) is no"),
        (Skipping(), "joins 2 values|'add' in module"),
    ],
)
def test_other_networks_are_refused(model, message):
    before = snapshot(model)
    for method in METHODS:
        with pytest.raises(MethodError, match=message):
            locc.compile(model, method, [], example_inputs=torch.randn(5, 9))
    assert same(before, snapshot(model))


class Alike(nn.Linear):
    """Spells out what its base computes, as timm's does."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class LowRank(nn.Linear):
    """Computes what its base does until its own parameter has moved."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x):
        return nn.functional.linear(x, self.weight + self.more, self.bias)


@pytest.mark.parametrize("method", METHODS)
def test_a_subclass_that_computes_what_a_layer_does_is_one(method):
    x, y = batch()
    results = []
    for kind in (nn.Linear, Alike):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), kind(8, 4)).to(D)
        program = locc.compile(model, method, ["0"], example_inputs=x, verify=False, seed=0)
        program.step(x, y)
        results.append(snapshot(model))
    assert same(*results)
    for other in (Doubled, LowRank, lambda *n: nn.utils.parametrizations.weight_norm(nn.Linear(*n))):
        model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), other(8, 4))
        with pytest.raises(MethodError, match=r"'2' \(\w+\) is no such layer"):
            locc.compile(model, method, ["0"], example_inputs=x.float())


class Tokens(nn.Module):
    """A language model's beginning; its forward is not to be run."""

    def __init__(self):
        super().__init__()
        self.proj, self.embed, self.norm = nn.Linear(4, 4), nn.Embedding(9, 4), nn.LayerNorm(4)


def test_what_fits_nowhere_is_named_before_the_model_is_captured():
    with pytest.raises(MethodError, match=r"'bcd2' is undefined .*'embed' \(Embedding\) is no such layer"):
        locc.compile(Tokens(), "bcd2", ["proj"], example_inputs=torch.randn(5, 9))
    model = Tokens()
    model.start = nn.Parameter(torch.zeros(4))
    with pytest.raises(MethodError, match="the model's 'start' is part of no such layer"):
        locc.compile(model, "bcd2", ["proj"], example_inputs=torch.randn(5, 9))


def test_what_nothing_below_learns_is_data():
    """A frozen start, whatever it is, and layers of which one is frozen."""
    model = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), *mlp()).to(D)
    model[:2].requires_grad_(False)
    model[5].weight.requires_grad_(False)
    before = snapshot(model)
    program = locc.compile(model, "bcd3", [], example_inputs=batch()[0], verify=False)
    program.step(*batch())
    after = snapshot(model)
    moved = {
        n for n, t in after.items() if not torch.equal(before[n], t) and "running" not in n and "num" not in n
    }
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


def test_settings_of_gradients_are_refused():
    x, _ = batch()
    for setting in ({"accumulate": 2}, {"clip": 1.0}, {"scheduler": lambda o: None}):
        with pytest.raises(
            MethodError, match=f"{next(iter(setting))}= is given, and method 'bcd3' has no gradients"
        ):
            locc.compile(mlp(), "bcd3", [], example_inputs=x, **setting)
    for wrong in ({"alpha": 0}, {"sweeps": 0}, {"output": "l1"}):
        with pytest.raises(MethodError, match=next(iter(wrong))):
            locc.compile(mlp(), "bcd3", [], example_inputs=x, **wrong)
    program = locc.compile(mlp(), "bcd3", ["1"], example_inputs=x, optimizer=torch.optim.Adam)
    assert not program.optimizers
    assert program.certificate.training == "no optimizer: what trains is set by formulas"
    assert program.certificate.memory is not None


def test_admm_says_where_sweeps_are_too_few():
    with pytest.warns(locc.LoccWarning, match="give sweeps=5, or the same batch"):
        locc.compile(mlp(), "admm", [], example_inputs=batch()[0], sweeps=4, verify=False)


def test_rho_of_dladmm_grows_where_the_cost_keeps_rising():
    program = locc.compile(mlp(), "dladmm", [], example_inputs=batch()[0], rho=0.004, verify=False)
    program.step(*batch())
    program.step(*batch())
    costs, rho = held(program, "c4"), held(program, "r4")
    assert costs[:2].isinf().all()
    assert costs[2] > 0
    for rising, wanted in (((0.0, 0.01, 0.02), 0.04), ((0.0, 0.02, 0.01), 0.04), ((0.0, 0.01, 0.02), 0.1)):
        costs.copy_(torch.tensor(rising, dtype=D))
        program.step(*batch())
        assert float(rho) == pytest.approx(wanted)
    program.step(*batch(seed=1))
    assert float(rho) == 0.004


@pytest.mark.parametrize("groups", [1, 2])
def test_the_formulas_of_a_convolution_are_minima(groups):
    """The gradient of what they minimise, by autograd through the layer itself, is zero there."""
    layer, pool = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, groups=groups).to(D), nn.AvgPool2d(2)
    product, b = product_of(layer, (pool,)), layer.bias.detach()
    v, below = torch.randn(2, 5, 4, 8, 8, dtype=D)
    u, w = torch.randn(5, 6, 2, 2, dtype=D), layer.weight.detach()
    fitted = fitted_weight(product, v, u, b, w, 0.7, 0.3).requires_grad_()
    solved = fitted_input(product, Bend(torch.tanh, None), 60, v, below, u, w, b, 0.7, 0.3).requires_grad_()

    def misfit(weight, value):
        out = nn.functional.conv2d(pool(value), weight, b, layer.stride, layer.padding, groups=groups)
        return 0.7 * (u - out).square().sum()

    (slope,) = torch.autograd.grad(misfit(fitted, v) + 0.3 * (fitted - w).square().sum(), fitted)
    assert slope.abs().max() < 1e-10
    (slope,) = torch.autograd.grad(misfit(w, solved) + 0.3 * (solved - below.tanh()).square().sum(), solved)
    assert slope.abs().max() < 1e-10


@pytest.mark.parametrize("method", ["admm", "bcd2", "bcd3", "dladmm"])
def test_sizes_that_may_vary_are_refused(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(
        MethodError, match=r"layer '0' has sizes that may vary \(T\).*leave them out of dynamic"
    ):
        locc.compile(model, method, ["0"], example_inputs=torch.randn(3, 6, 4), dynamic={"input": {1: "T"}})
