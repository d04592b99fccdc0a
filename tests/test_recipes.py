"""What `optimizer=None` means, and what a method says of a network that it does not suit."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import locc
from locc import LoccError, LoccWarning, OptimizerSpec, Recipe
from locc.optimizers import take_step
from support import batch, compiled, same, sgd, snapshot, usual_case

X, Y = batch()
NAMES = sorted(locc.methods())


def chain(activation: type[nn.Module] = nn.Tanh, norm: bool = False) -> nn.Sequential:
    """Three hidden modules and a linear head."""
    torch.manual_seed(0)
    widths = ((4, 8), (8, 8), (8, 8))
    hidden = (
        nn.Sequential(nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), activation())
        for a, b in widths
    )
    return nn.Sequential(*hidden, nn.Linear(8, 3))


SPLITS = ["0", "1", "2"]


@pytest.mark.parametrize("method", NAMES)
def test_without_an_optimizer_each_owner_has_that_of_the_recipe(method):
    program = usual_case(method).compile(optimizer=None)
    recipe = locc.methods()[method].recipe
    for name, optimizer in program.optimizers.items():
        owner = program.ir.owners[name]
        spec = recipe.of(name, owner.auxiliary)
        assert type(optimizer).__name__.lower() == spec.name
        assert {g["lr"] for g in optimizer.param_groups} == {spec.lr * owner.lr_scale}
        assert all(g[k] == v for g in optimizer.param_groups for k, v in spec.arguments.items())


RECIPE = Recipe(
    OptimizerSpec("sgd", 0.1, {"momentum": 0.9}), {"inverse": OptimizerSpec("adam", 0.01)}, "a test"
)


@pytest.mark.parametrize(("given", "rate"), [(RECIPE, 0.1), (RECIPE.at(0.2), 0.2)])
def test_auxiliaries_have_an_optimizer_of_their_own_in_proportion(given, rate):
    program = compiled(chain(), "dtp", SPLITS, optimizer=given, lr_scale=3.0)
    found = {name: (type(o), o.param_groups[0]["lr"]) for name, o in program.optimizers.items()}
    assert found["0"] == (torch.optim.SGD, rate)
    assert found["1.inverse"] == (torch.optim.Adam, pytest.approx(0.3 * rate))


def test_the_callers_own_optimizer_wins():
    program = compiled(chain(), "dfa", SPLITS, optimizer=sgd(0.5))
    assert {type(o) for o in program.optimizers.values()} == {torch.optim.SGD}
    assert program.certificate.training == "SGD (the caller's own)"


@pytest.mark.parametrize(
    ("spec", "dtype", "dense", "fused"),
    [
        (OptimizerSpec("adam"), torch.float64, True, True),
        (OptimizerSpec("adamw"), torch.bfloat16, True, True),
        (OptimizerSpec("sgd", 0.1), torch.float32, True, True),
        (OptimizerSpec("sgd", 0.1), torch.float32, False, None),
        (OptimizerSpec("adam"), torch.complex64, True, None),
        (OptimizerSpec("adam", arguments={"foreach": True}), torch.float32, True, None),
        (OptimizerSpec("adam", arguments={"fused": False}), torch.float32, True, False),
    ],
)
def test_the_optimizer_of_a_recipe_is_fused_where_pytorch_has_that(spec, dtype, dense, fused):
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = spec.build([parameter], dense)
    assert optimizer.param_groups[0]["fused"] is fused
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.detach().abs().min() > 0


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize(
    "place",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t,
    ],
    ids=["channels last", "every other element", "as it is"],
)
def test_no_layout_is_trained_otherwise(name, place):
    """Fused kernels mix up what is not contiguous; the gradient of the last one is not."""
    start, gradient = torch.randn(4, 3, 2, 2), torch.randn(2, 3, 2, 4).permute(3, 1, 0, 2)
    ends = []
    for fused in (False, True):
        parameter = nn.Parameter(place(start.clone()))
        optimizer = OptimizerSpec(name, 0.1, {"fused": fused}).build([parameter])
        for _ in range(2):
            parameter.grad = gradient.clone()
            take_step(optimizer)
        ends.append(parameter.detach())
    assert torch.allclose(*ends, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 0.1}, {"dampening": 0.5}])
def test_what_has_its_first_gradient_later_is_trained_alike_fused(options):
    gradients = torch.randn(3, 2, 5).unbind()
    ends = []
    for fused in (False, True):
        parameters = [nn.Parameter(torch.linspace(0, 1, 5)) for _ in range(2)]
        spec = OptimizerSpec("sgd", 0.1, {"momentum": 0.9, "fused": fused, **options})
        optimizer = spec.build(parameters)
        for step, pair in enumerate(gradients):
            parameters[0].grad = pair[0].clone()
            parameters[1].grad = pair[1].clone() if step else None
            take_step(optimizer)
        ends.append(torch.stack(list(parameters)).detach())
    assert torch.allclose(*ends, atol=1e-6)


def test_sparse_gradients_of_a_recipe():
    model = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    tokens = torch.randint(11, (5, 2))
    program = locc.compile(
        model, "dgl", ["1"], optimizer=Recipe(OptimizerSpec("sgd", 0.1)), example_inputs=tokens
    )
    before = snapshot(model[0])
    program.step(tokens, Y)
    assert not same(before, snapshot(model[0]))


def test_a_program_that_was_saved_unfused_goes_on_unfused(tmp_path):
    plain = Recipe(OptimizerSpec(arguments={"fused": False}))
    saved, loaded = (compiled(chain(), "dgl", SPLITS, optimizer=o, seed=0) for o in (plain, Recipe()))
    saved.step(X, Y)
    saved.save(tmp_path / "unfused")
    loaded.load(tmp_path / "unfused")
    assert not any(learner.gated for learner in loaded.built.learners.values())
    for program in (saved, loaded):
        program.step(X, Y)
    assert same(snapshot(saved), snapshot(loaded))


def test_the_recipe_and_its_source_are_told(caplog):
    with caplog.at_level(logging.INFO, logger="locc"):
        program = compiled(chain(), "dni", SPLITS)
    assert [r.getMessage() for r in caplog.records] == [f"method 'dni' trains with {program.built.training}"]
    assert "Adam(lr=3e-05)" in program.built.training
    assert "Jaderberg" in program.built.training
    assert program.built.training in " ".join(program.certificate.text(verbose=True).split())
    assert locc.verify(program).training == program.built.training


def test_a_recipe_at_another_rate_says_so():
    assert str(RECIPE.at(0.2)) == (
        "SGD(lr=0.2, momentum=0.9); each inverse Adam(lr=0.02) (a test; at 2 times its rate)"
    )
    assert RECIPE.at(0.1) == RECIPE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerSpec("adan"), "there is no optimizer 'adan'; nearest: 'adam'"),
        (lambda: OptimizerSpec("sgd", 0.0), "learning rate 0.0 of sgd: give a number above 0"),
        (lambda: RECIPE.at(-1.0), "learning rate -1.0 of sgd"),
        (lambda: compiled(chain(), "bp", SPLITS, optimizer="adam"), "or a locc.Recipe; found str"),
    ],
)
def test_what_is_no_recipe_is_refused(make, message):
    with pytest.raises(LoccError, match=message):
        make()


class Functional(nn.Module):
    """ReLU and normalisation as functions between the layers."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 8), nn.Linear(8, 3), norm

    def forward(self, x):
        h = self.a(x)
        if self.norm:
            h = torch.nn.functional.layer_norm(h, (8,))
        return self.b(torch.relu(h))


def positions(head):
    """A map of four channels at each of four positions, and a head."""
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 4, 1), nn.Tanh(), *head)


class Mean(nn.Module):
    """The mean over positions by a function between the layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.a, self.b, self.dim = positions(()), nn.Linear(4, 3), dim

    def forward(self, x):
        h = self.a(x)
        return self.b(h.mean(2)) if self.dim == 2 else self.b(h / h.mean(1, keepdim=True))[:, 0]


POOLED = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
FLAT = (nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("method", "model", "options", "message"),
    [
        ("dfa", positions(POOLED), {"splits": ["2"]}, "flatten in its place"),
        ("ifa", positions(POOLED), {"splits": ["2"]}, "flatten in its place"),
        ("dfa", positions(FLAT), {"splits": ["2"]}, None),
        ("dfa", positions(POOLED), {"splits": ["4"]}, None),
        ("ifa", Mean(2), {"splits": ["a"]}, "flatten in its place"),
        ("ifa", Mean(1), {"splits": ["a"]}, None),
        ("dfa", chain(nn.ReLU), {}, "put an nn.BatchNorm before each ReLU"),
        ("fa", chain(nn.ReLU), {}, "put an nn.BatchNorm before each ReLU"),
        ("dfa", Functional(False), {"splits": ["a"]}, "put an nn.BatchNorm before each ReLU"),
        ("dfa", Functional(True), {"splits": ["a"]}, None),
        ("dfa", chain(nn.ReLU, norm=True), {}, None),
        ("dfa", chain(nn.ReLU), {"splits": []}, None),
        ("fa", chain(nn.Tanh), {}, None),
        ("dtp", chain(nn.ReLU), {}, "the inverses of '1', '2' have to give what a ReLU gave"),
        ("dtp", chain(nn.ReLU, norm=True), {}, None),
        ("tp", chain(nn.ReLU), {}, "the inverses of '1', '2' have to give what a ReLU gave"),
        ("dtp", chain(nn.Tanh), {}, None),
        ("dni", chain(), {"optimizer": sgd(0.01)}, "module '0' has a learning rate of 0.01"),
        ("dni", chain(norm=True), {"optimizer": sgd(0.01)}, None),
        ("dni", chain(), {}, None),
        ("altmin", chain(nn.ReLU), {}, "modules '0', '1', '2' end in a nonlinearity"),
        ("altmin", chain(nn.Tanh), {"splits": ["0", "1.0"]}, "modules '0' end in a nonlinearity"),
        ("altmin", chain(nn.ReLU), {"splits": ["0.0", "1.0"]}, None),
    ],
)
def test_what_a_method_misses_is_a_warning_with_its_remedy(method, model, options, message):
    arguments = {"splits": SPLITS, **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = locc.compile(model, method, example_inputs=X, **arguments)
    told = [w for w in caught if issubclass(w.category, LoccWarning)]
    assert len(told) == (message is not None)
    assert [str(w.message).partition(": ")[2] for w in told] == list(program.built.advice)
    for certificate in (program.certificate, locc.verify(program)):
        assert set(program.built.advice) <= set(certificate.warnings)
    for warning in told:
        assert message in str(warning.message)
        assert warning.filename == __file__


def test_a_warning_made_an_error_leaves_the_model_as_it_was():
    model = chain(nn.ReLU)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoccWarning)
        with pytest.raises(LoccWarning):
            compiled(model, "dfa", SPLITS, zero_init=True)
    assert same(before, snapshot(model))


# ---- where to search ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", NAMES)
def test_each_end_of_each_range_is_a_value_that_the_method_takes(method):
    for option in locc.methods()[method].options.values():
        for value in option.choices or option.range or ():
            locc.method(method, **{option.name: value})
        if isinstance(option.default, (int, float, bool)):
            assert option.searchable, f"{option.name} declares no range"
            low, high = option.range or (0, 1)
            assert low <= option.default <= high


class FirstOrLast:
    """A trial of a search that suggests the lowest or the highest value, or the first or last choice."""

    def __init__(self, place: int) -> None:
        self.place = place

    def suggest_float(self, name, low, high, log=False):
        assert low < high
        assert low > 0 or not log
        return (low, high)[self.place]

    suggest_int = suggest_float

    def suggest_categorical(self, name, choices):
        return choices[-self.place]


@pytest.mark.parametrize(("method", "place"), [("dtp", 0), ("dni", 0), ("altmin", 1)])
def test_the_example_points_a_search_at_any_method(method, place):
    from examples.search import accuracy

    assert 0.0 <= accuracy(FirstOrLast(place), method, epochs=1) < 1.0


def test_batch_manhattan_is_sgd_on_signs():
    """Momentum and decay act after the sign; one weight has no gradient."""
    w, still = (nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(2))
    spec = OptimizerSpec("manhattan", 0.1, {"momentum": 0.9, "weight_decay": 0.01})
    optimizer, wanted, unmoved = spec.build([w, still]), w.detach().clone(), still.detach().clone()
    velocity = torch.zeros_like(wanted)
    for _ in range(3):
        w.grad = torch.randn_like(w) * 1e3
        velocity = 0.9 * velocity + w.grad.sign() + 0.01 * wanted
        wanted = wanted - 0.1 * velocity
        optimizer.step()
        torch.testing.assert_close(w.detach(), wanted, atol=1e-12, rtol=0)
    assert torch.equal(still, unmoved)
