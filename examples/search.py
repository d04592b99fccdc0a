"""Search the options and the learning rate of a method with Optuna, which is not installed with locc.

    pip install optuna
    python -m examples.search dtp --trials 20

Where to search is declared by each method (`locc.methods()[id].options`), so nothing here knows one of them.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import locc
from examples.digits import loaders
from examples.models import small_mlp


def suggest(trial: Any, option: Any) -> Any:
    """Let a trial choose the value of an option."""
    if option.choices:
        return trial.suggest_categorical(option.name, option.choices)
    low, high = option.range
    ask = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return ask(option.name, low, high, log=option.log)


def accuracy(trial: Any, method: str, epochs: int = 5) -> float:
    """Train a small network on the digits as a trial says; return its validation accuracy."""
    known = locc.methods()[method]
    options = {name: suggest(trial, o) for name, o in known.options.items() if o.searchable}
    published = known.recipe.modules.lr
    recipe = known.recipe.at(trial.suggest_float("lr", published / 30, published * 30, log=True))
    torch.manual_seed(0)
    training, validation = loaders()
    program = locc.compile(small_mlp(), method, "blocks.*", optimizer=recipe, seed=0, verify=False, **options)
    try:
        program.fit(training, epochs, progress=False)
    except (locc.RunError, locc.MethodError):  # it diverged, or has an option that this network does not suit
        return 0.0
    return program.evaluate(validation).accuracy or 0.0


def main() -> None:
    """Run the search."""
    import optuna

    parser = argparse.ArgumentParser(prog="python -m examples.search")
    parser.add_argument("method", nargs="?", default="dtp", choices=sorted(locc.methods()))
    parser.add_argument("--trials", type=int, default=20)
    given = parser.parse_args()
    (x, _), *_ = loaders()[0]
    locc.compile(small_mlp(), given.method, "blocks.*", example_inputs=x)  # raises where it is undefined here
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: accuracy(trial, given.method), given.trials)
    print(f"{given.method}: {study.best_value:.2%} with {study.best_params}")


if __name__ == "__main__":
    main()
