"""Trains entries of the table, one seed after the other, and goes on where it was cut."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from locc.compiler import compile
from locc.errors import LoccWarning, MethodError, RunError
from locc.program import Program
from locc.recipes import Recipe
from locc.registry import load as method_class
from locc.reproduce.data import Batches, Split, load
from locc.reproduce.results import Result, Results
from locc.reproduce.table import Budget, Entry


def run(
    chosen: Sequence[Entry],
    budget: str,
    seeds: int | None,
    folder: Path,
    results: Results,
    device: str = "cpu",
    tell: Callable[[Result], None] = lambda result: None,
) -> None:
    """Train what has no result yet, with seeds 0, 1, ...; a result is in the file when its training is over.

    With the budget "full", the training under way is saved after each epoch, beside the file of results, and
    a new run goes on with it.

    Raises:
        LoccError: data are missing.
    """
    for entry in chosen:
        given = entry.budget(budget)
        assert given is not None
        for seed in range(1 if entry.row.score else seeds or entry.setting.seeds):
            key = (entry.id, budget, str(given), seed)
            if key in results.found:
                continue
            kept = results.path.with_name(f"{entry.id.replace('/', '-')}-{seed}.safetensors")
            started = os.times().user
            value, error = measure(entry, given, seed, folder, device, kept if budget == "full" else None)
            seconds, today = os.times().user - started, date.today().isoformat()
            result = Result(*key, value, error, round(seconds, 1), today, hardware(device))
            results.add(result)
            kept.unlink(missing_ok=True)
            tell(result)


def measure(
    entry: Entry, budget: Budget, seed: int, folder: Path, device: str, kept: Path | None = None
) -> tuple[float | None, str]:
    """Train an entry; return percent correct of the test, or its loss, or None and why there is neither."""
    setting = entry.setting
    data = load(setting.data, folder, budget.samples, budget.tests)
    if entry.row.score is not None:
        return entry.row.score(data), ""
    try:
        training, test = _batches(data, entry, budget, seed, device)
        program = trainer(entry, budget, seed, training, device)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            if kept.exists():
                program.load(kept)
        program.fit(training, budget.epochs, progress=False, checkpoint=kept)
    except (MethodError, RunError) as error:
        return None, f"{type(error).__name__}: {error}"
    found = program.evaluate(test)
    if setting.loss or found.accuracy is None:
        return found.loss, ""
    return 100 * found.accuracy, ""


def trainer(entry: Entry, budget: Budget, seed: int, training: Batches, device: str) -> Program:
    """Compile an entry for some training data."""
    setting, row = entry.setting, entry.row
    torch.manual_seed(seed)
    model = setting.network().to(device, torch.float64 if setting.double else torch.float32)
    rate = setting.rate
    scheduler: Any = None
    if rate is not None:
        scheduler = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: rate(e / budget.epochs))  # noqa: E731
    splits = setting.splits if row.splits is None else row.splits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoccWarning)
        return compile(
            model,
            row.method,
            splits,
            example_inputs=training.x[:4],
            optimizer=_recipe(row.method, row.recipe, budget),
            scheduler=scheduler,
            seed=seed,
            verify=False,
            **row.options,
        )


def _recipe(method: str, given: Recipe | str | None, budget: Budget) -> Recipe:
    own = method_class(method)
    recipe = given if isinstance(given, Recipe) else own.published if given == "published" else own.recipe
    recipe = recipe or own.recipe
    return recipe.at(recipe.modules.lr * budget.faster)


def _batches(data: Split, entry: Entry, budget: Budget, seed: int, device: str) -> tuple[Batches, Batches]:
    kind = torch.float64 if entry.setting.double else None
    x, test_x = (t.to(device, kind) for t in (data.x, data.test_x))
    y, test_y = data.y.to(device), data.test_y.to(device)
    full = budget.batch < 0  # the same batch in each pass: its variables live on only in one order
    generator = None if full and not entry.setting.augment else torch.Generator().manual_seed(seed)
    size = len(x) if full else budget.batch
    return Batches(x, y, size, generator, entry.setting.augment), Batches(
        test_x, test_y, min(500, len(test_x))
    )


def hardware(device: str) -> str:
    """Return the class of hardware, without the name of a machine."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
