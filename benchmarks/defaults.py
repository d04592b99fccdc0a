"""What each method reaches with its default settings: test accuracy of an MLP on MNIST after a few epochs.

Every method trains the same 784-400-400-400-10 network, cut after each hidden layer (for `altmin`, before its
nonlinearity), from the same initial weights. Nothing is tuned: `optimizer=None` and the method's own
defaults. For comparison, `--published` takes the recipe that a method was published with where its default is
another, and `--adam RATE` Adam at one rate for all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import locc
from benchmarks.mnist import FOLDER, mnist

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(activation: str, norm: bool = False) -> nn.Sequential:
    """Return the network: three hidden blocks of 400 units, and the output layer."""
    blocks = [
        nn.Sequential(nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), ACTIVATIONS[activation]())
        for a, b in pairwise((784, 400, 400, 400))
    ]
    return nn.Sequential(*blocks, nn.Linear(400, 10))


def accuracy(method: str, seed: int, options: argparse.Namespace) -> float:
    """Train one network and return its accuracy on the test set."""
    torch.manual_seed(seed)
    model = mlp(options.activation, options.norm)
    training, test = mnist(options.batch_size, seed, options.data)
    recipe = None if options.adam is None else locc.Recipe().at(options.adam)
    if options.published:
        recipe = locc.methods()[method].published
    last = f".{1 if options.norm else 0}" if method == "altmin" else ""
    splits = [f"{block}{last}" for block in range(3)]
    program = locc.compile(model, method, splits, example_inputs=training.x[:4], optimizer=recipe, seed=seed)
    try:
        program.fit(training, options.epochs, progress=False)
    except locc.RunError as error:
        print(f"{method}, seed {seed}: {error}")
        return 0.0
    found = program.evaluate(test).accuracy
    assert found is not None
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.defaults", description=(__doc__ or "").split("\n")[0]
    )
    known = sorted(locc.methods())
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--activation", choices=sorted(ACTIVATIONS), default="relu")
    parser.add_argument("--norm", action="store_true", help="BatchNorm before each activation")
    parser.add_argument("--adam", type=float, metavar="RATE", help="train all with Adam at this rate")
    parser.add_argument("--published", action="store_true", help="train each as it was published")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the four files of MNIST")
    options = parser.parse_args(argv)
    options.methods = options.methods or known
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        parser.error(f"no method {unknown[0]!r}; there are {', '.join(known)}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = arguments(argv)
    try:
        mnist(options.batch_size, 0, options.data)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    console = Console()
    norm = " with BatchNorm" if options.norm else ""
    optimizer = "each method's own recipe" if options.adam is None else f"Adam at {options.adam}"
    if options.published:
        optimizer = "each method as published"
    table = Table(
        title=f"784-400-400-400-10 {options.activation}{norm}, {options.epochs} epochs of MNIST, batches of "
        f"{options.batch_size}, {optimizer}",
        title_justify="left",
    )
    for column in ("method", "accuracy: median", "lowest", "highest", "seconds a run"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in options.methods:
        started = time.perf_counter()
        found = [accuracy(method, seed, options) for seed in options.seeds]
        seconds = (time.perf_counter() - started) / len(found)
        table.add_row(
            method, *(f"{x:.2%}" for x in (median(found), min(found), max(found))), f"{seconds:.0f}"
        )
        console.print(f"{method:<8} {median(found):.2%}", highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
