"""`altmin`: the training graph, the rule by hand, its memory and what it refuses.

The authors' formulation (IBM/online-alt-min, 105b1bb, altmin.py): `compute_codes_loss`, lines 24 to 41,
`update_codes`, 233 to 266, `update_last_layer_` and `update_hidden_weights_adam_`, 269 to 299; the memory is
`update_memory`, 44 to 79, and `BCD`, 90 to 119. Ours departs in the pull of a code to its first value, which
has no gradient in theirs: the clone in line 240 is made after the code has entered the tape.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locc
from locc.errors import MethodError
from locc_passes.auxiliary_variables.fits import by_columns
from support import Pair, Skip, snapshot

D = torch.float64


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 7),
        nn.Tanh(),
        nn.Linear(7, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.BatchNorm1d(6, momentum=None),
        nn.Linear(6, 4),
    ).to(D)


SPLITS = ["1", "3", "6"]


def batch(size=5):
    return torch.randn(size, 6, dtype=D), torch.randint(0, 4, (size,))


def sgd(lr=0.1, **options):
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def small():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).to(D)


AFTER = """\
# 3 modules: 0, 2, 4
# region 'codes_2' runs 5 times, carrying moving <- code, momentum <- momentum_1
# region 'codes_0' runs 5 times, carrying moving_1 <- code_1, momentum_2 <- momentum_3
def step(self, input_1, target):
    # ---- module 0: 0
    layer_0 = self[0](input_1)  # f64[B,8]
    # ---- module 1: 2
    layer_0_at_2 = stop_gradient(layer_0)  # f64[B,8]
    layer_1 = self[1](layer_0_at_2)  # f64[B,8]
    layer_2 = self[2](layer_1)  # f64[B,7]
    rest_1 = still(layer_0_at_2)  # f64[B,8]
    moving_1 = carry(layer_0_at_2)  # f64[B,8], in codes_0
    momentum_2 = carry(rest_1)  # f64[B,8], in codes_0
    leaf_1 = stop_gradient(moving_1)  # f64[B,8], in codes_0
    model_1 = self[1](leaf_1)  # f64[B,8], in codes_0
    model_2 = self[2](model_1)  # f64[B,7], in codes_0
    energy_5 = mse_loss(leaf_1, layer_0_at_2)  # f64[], in codes_0
    # ---- module 2: 4
    layer_2_at_4 = stop_gradient(layer_2)  # f64[B,7]
    layer_3 = self[3](layer_2_at_4)  # f64[B,7]
    layer_4 = self[4](layer_3)  # f64[B,4]
    rest = still(layer_2_at_4)  # f64[B,7]
    moving = carry(layer_2_at_4)  # f64[B,7], in codes_2
    momentum = carry(rest)  # f64[B,7], in codes_2
    leaf = stop_gradient(moving)  # f64[B,7], in codes_2
    model_3 = self[3](leaf)  # f64[B,7], in codes_2
    model_4 = self[4](model_3)  # f64[B,4], in codes_2
    energy = cross_entropy(model_4, target)  # f64[], in codes_2
    energy_1 = energy / 0.003  # f64[], in codes_2
    energy_2 = mse_loss(leaf, layer_2_at_4)  # f64[], in codes_2
    energy_3 = energy_1 + energy_2  # f64[], in codes_2
    grad_leaf = gradient(energy_3, leaf)  # f64[B,7], in codes_2
    momentum_1 = nesterov_momentum(momentum, grad_leaf, 0.9)  # f64[B,7], in codes_2
    code = nesterov_step(moving, grad_leaf, momentum_1, 0.3, 0.9)  # f64[B,7], in codes_2
    loss = cross_entropy(layer_4, target)  # f64[]
    code_at_4 = stop_gradient(code)  # f64[B,7]
    model_7 = self[3](code_at_4)  # f64[B,7]
    model_8 = self[4](model_7)  # f64[B,4]
    loss_1 = cross_entropy(model_8, target)  # f64[]
    objective(loss_1)  # 4.loss
    # ---- module 1: 2
    code_at_2 = stop_gradient(code)  # f64[B,7]
    energy_4 = mse_loss(model_2, code_at_2)  # f64[], in codes_0
    energy_6 = energy_4 + energy_5  # f64[], in codes_0
    grad_leaf_1 = gradient(energy_6, leaf_1)  # f64[B,8], in codes_0
    momentum_3 = nesterov_momentum(momentum_2, grad_leaf_1, 0.9)  # f64[B,8], in codes_0
    code_1 = nesterov_step(moving_1, grad_leaf_1, momentum_3, 0.3, 0.9)  # f64[B,8], in codes_0
    code_1_at_2 = stop_gradient(code_1)  # f64[B,8]
    model_5 = self[1](code_1_at_2)  # f64[B,8]
    model_6 = self[2](model_5)  # f64[B,7]
    fit_1 = mse_loss(model_6, code_at_2)  # f64[]
    objective(fit_1)  # 2.codes
    # ---- module 0: 0
    code_1_at_0 = stop_gradient(code_1)  # f64[B,8]
    fit = mse_loss(layer_0, code_1_at_0)  # f64[]
    objective(fit)  # 0.codes
    return layer_4
"""


def test_the_training_graph():
    assert str(locc.compile(small(), "altmin", ["0", "2"], example_inputs=batch()[0]).ir) == AFTER


class Oracle:
    """The method in plain PyTorch: parts are the modules, one optimizer each; all forwards in train mode."""

    def __init__(self, parts, steps=5, mu=0.003, lambda_c=0.0, lambda_w=0.0, mu_step=0.0):
        self.parts = parts
        self.optimizers = [torch.optim.SGD(p.parameters(), lr=0.1) for p in self.parts]
        self.steps, self.mu, self.lambda_c, self.lambda_w = steps, mu, lambda_c, lambda_w
        self.mu_step, self.cap = mu_step, 10 * mu

    def step(self, x, y):
        codes, h = [], x
        with torch.no_grad():
            for part in self.parts:
                h = part(h.clone())
                codes.append(h)
        network_loss = F.cross_entropy(codes.pop(), y)
        for k in reversed(range(len(codes))):
            start = codes[k].clone()
            c = codes[k].clone().requires_grad_()
            optimizer = torch.optim.SGD([c], lr=0.3, momentum=0.9, nesterov=True)
            for _ in range(self.steps):
                out = self.parts[k + 1](c.clone())
                if k == len(codes) - 1:
                    energy = F.cross_entropy(out, y) / self.mu + F.mse_loss(c, start)
                else:
                    energy = F.mse_loss(out, codes[k + 1]) + F.mse_loss(c, start)
                energy = energy + self.lambda_c / self.mu * c.abs().mean()
                (c.grad,) = torch.autograd.grad(energy, c)
                optimizer.step()
            codes[k] = c.detach()
        self.codes = codes
        objectives = [F.cross_entropy(self.parts[-1](codes[-1].clone()), y)]
        for k, part in enumerate(self.parts[:-1]):
            out = part((x if k == 0 else codes[k - 1]).clone())
            size = sum(p.abs().mean() for p in part.parameters() if p.dim() > 1)
            objectives.append(F.mse_loss(out, codes[k]) + self.lambda_w * size)
        for objective in objectives:
            objective.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.mu = min(self.mu + self.mu_step, self.cap)
        return network_loss, [o.detach() for o in objectives]


@pytest.mark.parametrize(
    "options",
    [
        {"mu": 0.3},
        {"mu": 0.1, "steps": 2, "lambda_c": 0.05, "lambda_w": 0.2},
        {"mu": 0.25, "mu_step": 1.5, "lambda_c": 0.05},
    ],
)
def test_against_the_rule_by_hand(options):
    model = mlp()
    twin = copy.deepcopy(model)
    oracle = Oracle([twin[:2], twin[2:4], twin[4:7], twin[7:]], **options)
    program = locc.compile(model, "altmin", SPLITS, example_inputs=batch()[0], optimizer=sgd(), **options)
    for _ in range(4):
        x, y = batch()
        report = program.step(x, y)
        loss, (last, *hidden) = oracle.step(x, y)
        torch.testing.assert_close(report.loss, loss, atol=1e-10, rtol=0)
        names = ["1.codes", "3.codes", "6.codes", "output.loss"]
        assert sorted(report.objectives) == names
        for name, value in zip(names, [*hidden, last], strict=True):
            torch.testing.assert_close(report.objectives[name], value, atol=1e-10, rtol=0)
        expected = {n: t for part in oracle.parts for n, t in part.state_dict().items()}
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("options", [{}, {"lambda_w": 0.01, "forget": 0.2, "sweeps": 3}])
def test_a_memory_of_codes_against_the_rule_by_hand(options):
    layers = [nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 4)]
    model = nn.Sequential(*layers).to(D)
    twin = copy.deepcopy(model)
    oracle = Oracle([twin[:1], twin[1:3], twin[3:]], mu=0.3)
    program = locc.compile(
        model,
        "altmin",
        ["0", "2"],
        example_inputs=batch()[0],
        optimizer=sgd(),
        mu=0.3,
        memory=True,
        **options,
    )
    forget, shrink = options.get("forget", 0.0), options.get("lambda_w", 0.0)
    held = [(np.zeros((n, n)), np.zeros((m, n))) for m, n in ((8, 6), (7, 8))]
    for _ in range(4):
        x, y = batch()
        weights = [twin[k].weight.detach().numpy().copy() for k in (0, 2)]
        _, (last, *_) = oracle.step(x, y)
        report = program.step(x, y)
        torch.testing.assert_close(report.objectives["4.loss"], last, atol=1e-10, rtol=0)
        assert list(report.objectives) == ["4.loss"]
        read = [x.numpy(), np.tanh(oracle.codes[0].numpy())]
        for k, (w, a, c) in enumerate(zip(weights, read, oracle.codes, strict=True)):
            pair = (a.T @ a, c.numpy().T @ a)
            keep, new = (1 - forget, forget) if forget else (1, 1)
            held[k] = tuple(keep * h + new * p for h, p in zip(held[k], pair, strict=True))
            aa, ca = held[k]
            for _ in range(options.get("sweeps", 1)):
                before = w.copy()
                for j in range(w.shape[1]):
                    w[:, j] += (ca[:, j] - w @ aa[:, j]) / (aa[j, j] + 1e-10)
                    w[:, j] = np.sign(w[:, j]) * np.maximum(np.abs(w[:, j]) - shrink, 0)
                if np.abs(w - before).max() < 1e-3:
                    break
            twin[2 * k].weight.data = torch.tensor(w)
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, atol=1e-10, rtol=0, msg=name)


def test_sweeps_end_when_nothing_moves():
    a, best = torch.tensor([[1, 0.9], [0.9, 1]], dtype=D), torch.tensor([[1.0, 2.0]], dtype=D)
    given = (best + torch.tensor([[0, 5e-4]], dtype=D), a, best @ a, 0.0)
    assert torch.equal(by_columns(*given, 1), by_columns(*given, 9))  # the first moves less than 1e-3
    assert not torch.allclose(by_columns(*given, 1, 0.0), by_columns(*given, 9, 0.0), atol=1e-6)


def test_a_memory_leaves_frozen_weights_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )
    model[0].requires_grad_(False)
    x, y = batch()
    x, y = x.float(), y % 3
    program = locc.compile(model, "altmin", ["0", "2"], example_inputs=x, memory=True)
    before = snapshot(model)
    program.step(x, y)
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert moved == {"2.weight", "4.weight", "4.bias"}


def test_a_memory_fits_linear_layers_alone():
    with pytest.raises(
        MethodError, match=r"memory=True fits.* module '1' is no such module.*'0.weight' trains"
    ):
        locc.compile(mlp(), "altmin", SPLITS, example_inputs=batch()[0], memory=True)


def test_a_skip_over_a_module_is_refused():
    with pytest.raises(MethodError, match="skips from module 'a' to 'out'"):
        locc.compile(Skip(6, 6), "altmin", ["a", "b"], example_inputs=torch.randn(5, 6))
    for options, message in (({"steps": 0}, "at least one inner step"), ({"mu": 0}, "above 0")):
        with pytest.raises(MethodError, match=message):
            locc.compile(Skip(6, 6), "altmin", ["a"], **options)


def test_each_of_two_values_across_a_cut_has_its_code():
    model = Pair(6).to(D)
    twin = copy.deepcopy(model)
    x, y = batch()
    program = locc.compile(model, "altmin", ["cell"], example_inputs=x, optimizer=sgd(), mu=0.1)
    program.step(x, y)
    with torch.no_grad():
        start = twin.cell(x)
    codes = [c.clone().requires_grad_() for c in start]
    optimizer = torch.optim.SGD(codes, lr=0.3, momentum=0.9, nesterov=True)
    for _ in range(5):
        optimizer.zero_grad()
        out = twin.out(torch.cat([torch.tanh(codes[0]), codes[1]], 1))
        fits = sum(F.mse_loss(c, s) for c, s in zip(codes, start, strict=True))
        (F.cross_entropy(out, y) / 0.1 + fits).backward()
        optimizer.step()
    twin.zero_grad()
    codes = [c.detach() for c in codes]
    sum(F.mse_loss(v, c) for v, c in zip(twin.cell(x), codes, strict=True)).backward()
    F.cross_entropy(twin.out(torch.cat([torch.tanh(codes[0]), codes[1]], 1)), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, (q - 0.1 * q.grad).detach(), atol=1e-10, rtol=0)


def test_rotary_tables_and_masks_enter_as_they_are():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=12,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    before = copy.deepcopy(model)
    tokens = torch.randint(0, 20, (3, 5))
    program = locc.compile(model, "altmin", ["model.layers.*"], example_inputs={"input_ids": tokens})
    assert list(program.ir.repeats) == ["codes_model.layers.1", "codes_model.layers.0"]
    assert all(len(region.carried) == 2 for region in program.ir.repeats.values())
    program.step({"input_ids": tokens}, tokens)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q), name


def test_a_borrowed_parameter_is_refused():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(MethodError, match="a code cannot stand for it: compile with tied='copy'"):
        locc.compile(model, "altmin", ["0"], example_inputs=torch.randn(5, 6), tied="owner")


@pytest.mark.parametrize("times_the_bound", [0.95, 1.05])
def test_inner_steps_on_a_squared_loss_diverge_beyond_the_bound(times_the_bound):
    """Nesterov's SGD on a quadratic is stable up to rate x curvature = 2 (1 + 0.9) / (1 + 2 x 0.9)."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    curvature = 2 * torch.linalg.matrix_norm(model[1].weight, 2).item() ** 2 / (10 * 0.003) + 2 / 15
    program = locc.compile(
        model, "altmin", ["0"], loss="mse", example_inputs=x, optimizer=sgd(),
        rate=times_the_bound * 3.8 / 2.8 / curvature, steps=200,
    )  # fmt: skip
    assert any("lower rate, or raise mu" in advice for advice in program.built.advice)
    assert (program.step(x, y).objectives["0.codes"] < 1e3) == (times_the_bound < 1)
