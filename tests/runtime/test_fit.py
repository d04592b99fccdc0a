from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import locc
from locc import LoccError
from locc.runtime.fit import batch_of
from support import batch, compiled, mlp, same, sgd, snapshot

X, Y = batch(10)
DATA = TensorDataset(X, Y)


def test_a_loader_with_a_last_partial_batch():
    program = compiled(mlp(), "dgl", ["relu1"])
    history = program.fit(
        DataLoader(DATA, batch_size=4), epochs=2, validation=DataLoader(DATA, 3), progress=False
    )
    assert program.steps == 6
    assert program.epochs == 2
    assert [e.number for e in history.epochs] == [1, 2]
    assert history.epochs[0].validation is not None
    assert history.epochs[0].validation.samples == 10
    assert set(history.epochs[0].objectives) == set(program.step(X, Y).objectives)
    assert "epoch 1  loss" in str(history)


def test_means_are_over_the_steps():
    program = compiled(mlp(), "bp", ["relu1"], optimizer=sgd(0.0))
    losses = [float(program.step(X[i : i + 5], Y[i : i + 5]).loss) for i in (0, 5)]
    history = program.fit(DataLoader(DATA, 5), progress=False)
    assert history.epochs[0].loss == pytest.approx(sum(losses) / 2)


def test_a_fit_is_a_loop_over_steps_and_shuffles_anew_in_each_epoch():
    seen: list[Tensor] = []
    fitted, stepped = (compiled(mlp(0.3), "dgl", ["relu1"], optimizer=sgd(), seed=0) for _ in range(2))
    stepped.model.load_state_dict(fitted.model.state_dict())
    fitted.model.first.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    loader = DataLoader(DATA, 5, shuffle=True)
    torch.manual_seed(3)
    fitted.fit(loader, epochs=2, progress=False)
    torch.manual_seed(3)
    for _ in range(2):
        for x, y in loader:
            stepped.step(x, y)
    assert same(snapshot(fitted.root), snapshot(stepped.root))
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("item", "x", "y"),
    [
        ((1, 2), 1, 2),
        ([1, 2], 1, 2),
        ((1, 2, 3), (1, 2), 3),
        ({"a": 1, "labels": 2}, {"a": 1}, 2),
        ({"a": 1, "target": 2}, {"a": 1}, 2),
        (((1, 2), 3), (1, 2), 3),
    ],
)
def test_forms_of_a_batch(item, x, y):
    assert batch_of(item) == (x, y)


@pytest.mark.parametrize("item", [torch.zeros(3), (1,), {"a": 1}, 3, "text"])
def test_batches_without_a_target(item):
    with pytest.raises(LoccError, match=r"'labels'"):
        batch_of(item)


def test_dicts_as_keyword_inputs():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, features: Tensor, scale: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(features)) * scale)

    program = locc.compile(Named(), "bp", ["a"])
    data = [{"features": X, "scale": torch.ones(10, 1), "labels": Y}] * 2
    program.fit(data, progress=False)
    assert program.steps == 2
    assert program.evaluate(data).samples == 20


def test_an_empty_loader():
    program = compiled(mlp(), "bp", ["relu1"])
    for loader in ([], iter([]), DataLoader(TensorDataset(X[:0], Y[:0]))):
        with pytest.raises(LoccError, match="the loader yielded no batch"):
            program.fit(loader, progress=False)
    with pytest.raises(LoccError, match="the loader yielded no batch to evaluate"):
        program.evaluate([])
    with pytest.raises(LoccError, match="the loader yielded no batch"):
        locc.compile(mlp(), "bp").fit([], progress=False)


def test_a_generator_serves_one_epoch_and_loses_no_batch():
    program = locc.compile(mlp(), "bp", ["relu1"])
    program.fit(((X, Y) for _ in range(3)), progress=False)
    assert program.steps == 3
    with pytest.raises(LoccError, match="a generator can be iterated only once"):
        program.fit(((X, Y) for _ in range(3)), epochs=2, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs=-1: give a number"),
        ({"epochs": 1.5}, "epochs=1.5: give a number"),
        ({"scheduler_interval": "batch"}, "scheduler_interval='batch': choose 'epoch' or 'step'"),
        ({"epochs": "1"}, "epochs='1': give a number"),
        ({"loader": None}, "loader must be an iterable of batches; found NoneType"),
        (
            {"loader": TensorDataset(X, Y)},
            "loader must be .*, such as a DataLoader of it; found TensorDataset",
        ),
        ({"validation": 5}, "validation must be an iterable of batches; found int"),
    ],
)
def test_unusable_arguments(options, message):
    program = compiled(mlp(), "bp", ["relu1"])
    arguments = {"loader": [(X, Y)], "progress": False, **options}
    with pytest.raises(LoccError, match=message):
        program.fit(**arguments)
    assert program.steps == 0


def test_no_epochs_do_nothing():
    program = compiled(mlp(), "bp", ["relu1"])
    assert program.fit([(X, Y)], epochs=0, progress=False).epochs == []


def test_the_progress_bar_shows_and_goes(capsys):
    compiled(mlp(), "dgl", ["relu1"]).fit([(X, Y)] * 3, epochs=2)
    assert "epoch 2" in capsys.readouterr().out


def test_the_mode_of_before_comes_back():
    program = compiled(mlp(), "bp", ["relu1"])
    norm = program.model.get_submodule("drop").eval()
    program.evaluate([(X, Y)])
    assert program.training
    assert not norm.training
    program.eval()
    program.fit([(X, Y)], progress=False)
    assert not program.training


def test_evaluation_is_the_mean_over_samples_in_eval_mode():
    model = mlp(dropout=0.9)
    program = compiled(model, "bp", ["relu1"])
    found = program.evaluate(DataLoader(DATA, 3))
    model.eval()
    output = model(X)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(output, Y)), abs=1e-6)
    assert found.accuracy == pytest.approx(float((output.argmax(1) == Y).float().mean()))
    assert str(found).startswith("loss ")


# ---- learning rates ----------------------------------------------------------------------------


def test_a_shared_scheduler_advances_in_every_module():
    program = compiled(
        mlp(),
        "dgl",
        ["relu1"],
        optimizer=sgd(1.0),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    )
    program.fit([(X, Y)] * 3, epochs=2, progress=False)
    assert {o.param_groups[0]["lr"] for o in program.optimizers.values()} == {0.25}
    program.fit([(X, Y)] * 2, progress=False, scheduler_interval="step")
    assert {o.param_groups[0]["lr"] for o in program.optimizers.values()} == {0.0625}


def test_a_scheduler_for_one_module():
    schedulers = {"relu1": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)}
    program = compiled(mlp(), "dgl", ["relu1"], optimizer=sgd(1.0), scheduler=schedulers)
    program.fit([(X, Y)], progress=False)
    assert {n: o.param_groups[0]["lr"] for n, o in program.optimizers.items()} == {
        "relu1": 0.5,
        "output": 1.0,
    }


def test_a_plateau_is_that_of_the_modules_own_objective():
    seen: dict[int, list[float]] = {}

    class Watching(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: float, epoch: Any = None) -> None:
            seen.setdefault(id(self), []).append(float(metrics))
            super().step(metrics)

    program = compiled(mlp(), "dgl", ["relu1"], scheduler=lambda o: Watching(o))
    history = program.fit([(X, Y)] * 2, progress=False)
    expected = [[v] for v in history.epochs[0].objectives.values()]
    assert sorted(seen.values()) == sorted(expected)


def test_under_the_sequential_schedule_only_the_module_in_training_advances():
    program = compiled(
        mlp(),
        "dgl",
        ["relu1"],
        schedule="sequential",
        optimizer=sgd(1.0),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    )
    program.fit([(X, Y)], epochs=2, progress=False)
    assert {o.param_groups[0]["lr"] for o in program.optimizers.values()} == {0.25}


@pytest.mark.parametrize(
    ("rate", "loss", "warned"), [(0.0, "cross_entropy", 1), (1.0, "cross_entropy", 0), (0.0, "mse", 0)]
)
def test_a_classifier_that_still_guesses_is_told_of(rate, loss, warned):
    program = compiled(mlp(), "dgl", ["relu1"], optimizer=sgd(rate), loss=loss)
    torch.nn.init.zeros_(list(program.model.parameters())[-2])
    x, y = X, (X[:, 0] > 0).long()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        program.fit([(x, y)], epochs=50, progress=False)
    found = [w for w in told if "a guess among 3 classes" in str(w.message)]
    assert len(found) == warned
    assert all(w.filename == __file__ for w in found)
