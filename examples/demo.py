"""`make demo`: one small network, trained by two local methods and, beside them, by backpropagation.

For each method: compile, train with a progress bar, prove, export to ONNX and compare onnxruntime's outputs
with PyTorch's. A table at the end sets the methods side by side; the certificates are in files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import locc
import locc.callbacks
from benchmarks.meter import Timing, gradients_of, interleave, peak, ratio
from examples.digits import digits, loaders
from examples.models import small_cnn

METHODS = ("dtp", "predsim", "bp")
SPLITS = ("layer1", "layer2", "layer3")
SEED = 0
BATCH_SIZE = 64
EXPORT_BATCHES = (1, 7, 64)


@dataclass
class Run:
    """A trained program and what was found about it."""

    method: str
    program: locc.Program
    accuracy: float


def train(method: str, epochs: int, folder: Path, console: Console) -> Run:
    """Train a fresh copy of the network with one method, prove it, export it."""
    torch.manual_seed(SEED)
    model = small_cnn()
    training, validation = loaders(BATCH_SIZE, seed=SEED)
    example, _ = next(iter(validation))

    program = locc.compile(
        model,
        method=method,
        splits=SPLITS,
        loss="cross_entropy",
        example_inputs=example[:BATCH_SIZE],
        seed=SEED,
    )
    started = time.perf_counter()
    bar = locc.callbacks.ProgressBar(lines=False)
    program.fit(training, epochs=epochs, validation=validation, progress=False, callbacks=[bar])
    seconds = time.perf_counter() - started
    accuracy = program.evaluate(validation).accuracy or 0.0
    console.print(f"\n{method}: {accuracy:.1%} of the validation images after {seconds:.1f} s of training")

    certificate = program.certificate
    text = folder / f"{method}.txt"
    text.write_text(certificate.text(verbose=True), encoding="utf-8")
    held = sum(check.status == "held" for check in certificate.checks)
    console.print(f"  proof  {certificate.verdict}, {held} of {len(certificate.checks)} checks held: {text}")

    path = folder / f"{method}.onnx"
    program.export_onnx(path)
    difference = compare(program, path)
    sizes = ", ".join(map(str, EXPORT_BATCHES))
    console.print(f"  ONNX   differs from PyTorch by {difference:.0e} at most (batches of {sizes}): {path}")
    return Run(method, program, accuracy)


def compare(program: locc.Program, path: Path) -> float:
    """Run an exported file in onnxruntime and return its largest difference from PyTorch."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (node.name for node in session.get_inputs())
    images = digits().validation_x
    program.eval()
    differences = []
    for size in EXPORT_BATCHES:
        batch = images[:size]
        with torch.no_grad():
            expected = program(batch)
        (found,) = session.run(None, {name: batch.numpy()})
        differences.append(float((torch.from_numpy(found) - expected).abs().max()))
    program.train()
    return max(differences)


def measure(runs: Sequence[Run], rounds: int) -> dict[str, list[float]]:
    """Time one training step of every program, in turn."""
    x, y = one_batch()
    return interleave({run.method: partial(run.program.step, x, y) for run in runs}, rounds)


def one_batch() -> tuple[Tensor, Tensor]:
    """Return a batch of training images and their labels."""
    data = digits()
    return data.train_x[:BATCH_SIZE], data.train_y[:BATCH_SIZE]


def table(runs: Sequence[Run], rounds: int) -> Table:
    """Set the methods side by side."""
    times = measure(runs, rounds)
    x, y = one_batch()
    result = Table(title="small_cnn on scikit-learn's digits, 4 modules", title_justify="left")
    result.add_column("method")
    for column in ("accuracy", "step, ms", "step / bp", "peak, MiB", "peak / bp"):
        result.add_column(column, justify="right")
    peaks = {run.method: peak(partial(run.program.step, x, y), gradients_of(run.program)) for run in runs}
    for run in runs:
        used = peaks[run.method].total
        result.add_row(
            run.method,
            f"{run.accuracy:.1%}",
            f"{Timing.of(times[run.method]).median:.2f}",
            f"{ratio(times, run.method, 'bp').median:.2f}",
            f"{used / 2**20:.2f}",
            f"{used / peaks['bp'].total:.2f}",
        )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=50, help="of the step-time measurement")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where certificates and ONNX files go")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)  # as fast as two on tensors this small, and steadier

    epochs = options.epochs
    console.print(
        f"A small network in 4 modules learns scikit-learn's digits: {epochs} epochs with each method,\n"
        "from the same weights and on the same batches. dtp and predsim train each module on an\n"
        "objective of its own; bp is backpropagation, for comparison."
    )
    runs = [train(method, epochs, options.out, console) for method in METHODS]
    console.print()
    console.print(table(runs, options.rounds))
    console.print(
        f"Step: median of {options.rounds} interleaved steps on one batch of {BATCH_SIZE}. "
        "Peak: activations and gradients during a step.\n"
        "A network this small shows that the methods work, not what they save: for that, `make bench`."
    )


if __name__ == "__main__":
    main()
