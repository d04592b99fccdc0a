"""`make bench`: step time and peak memory of local training against end-to-end backpropagation.

Contestants train copies of one model on one batch, in turn: end-to-end backpropagation, eager and compiled,
the faster of which the others are compared with; the same with checkpoints at every block and the optimizer
inside of the backward pass, which is how one trains end to end in little memory; a detach loop written by
hand; and locc's `dgl` with the same heads, eager and compiled (at the largest K alone, unless told: compiling
takes most of the time), and at the largest K in waves (a module after the other on some batches), with
cheaper heads where there are some, and with these in little memory (updates in the backward pass, and some
activations computed again where that pays). All have Adam, fused. Times are the median of the rounds, with
the fastest and the slowest; a ratio is taken within each round. Beside it is the arithmetic: the ratio of
the floating-point operations in matrix products, convolutions and attention, which is what the time would be
if nothing else took any.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import (
    COMPILED,
    END_TO_END,
    HANDWRITTEN,
    INDUCTOR,
    LITTLE,
    LOCC,
    compiles,
    contestants,
    largest_module,
)
from benchmarks.meter import Timing, flops, interleave, ratio
from benchmarks.models import DEFAULT, WORKLOADS, Workload


@dataclass(frozen=True)
class Row:
    """What one contestant at one K cost; end to end is the faster of eager and compiled."""

    model: str
    modules: int
    contestant: str
    first_step: float
    milliseconds: Timing
    time_to_end_to_end: Timing
    time_to_handwritten: Timing | None
    time_to_little_memory: Timing
    flops_to_end_to_end: float | None
    peak: int
    memory_to_end_to_end: float
    memory_to_little_memory: float | None
    memory_to_largest_module: float


def measure(workload: Workload, given: argparse.Namespace, until: float) -> list[Row]:
    """Run one workload and return a row for each contestant."""
    torch.compiler.reset()  # what is known of other models' sizes
    counts = given.modules
    entered = contestants(workload, counts, not given.without_locc, given.inductor)
    names = [f"{c.label} K={c.modules}" for c in entered]
    first = [seconds(c.step) for c in entered]
    clock = time.process_time if given.processor else time.perf_counter
    times = interleave(
        dict(zip(names, [c.step for c in entered], strict=True)), given.rounds, 1, until, clock
    )
    for name, one in zip(names, entered, strict=True):
        times[name] = [taken / one.batches for taken in times[name]]
    peaks = dict(zip(names, [c.peak() for c in entered], strict=True))
    operations = [None if c.compiled else flops(c.step) / c.batches for c in entered]
    usual = {False: f"{END_TO_END} K=1", True: f"{COMPILED} K=1"}
    fastest = min((n for n in usual.values() if n in times), key=lambda name: Timing.of(times[name]).median)
    little = f"{LITTLE} K=1"
    torch.manual_seed(0)
    model, (x, y) = workload.model(), workload.batch()
    largest = {1: {kind: peaks[name] for kind, name in usual.items() if name in peaks}}
    largest |= {k: largest_module(workload, model, x, y, k, k in given.inductor) for k in counts if k > 1}
    return [
        Row(
            workload.name,
            one.modules,
            one.label,
            began,
            Timing.of(times[name]),
            ratio(times, name, fastest),
            ratio(times, name, f"{HANDWRITTEN} K={one.modules}")
            if one.modules > 1 and one.label in (LOCC, INDUCTOR)
            else None,
            ratio(times, name, little),
            None if done is None else done / operations[0],
            peaks[name],
            peaks[name] / peaks[usual[one.compiled]],
            None if one.compiled else peaks[name] / peaks[little],
            peaks[name] / largest[one.modules][one.compiled],
        )
        for one, name, done, began in zip(entered, names, operations, first, strict=True)
    ]


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the rows of one workload."""
    table = Table(title=f"{rows[0].model}: 12 blocks", title_justify="left")
    table.add_column("K", justify="right")
    table.add_column("contestant")
    for column in (
        *("first step, s", "step, ms", "time / end-to-end", "arithmetic / end-to-end", "time / handwritten"),
        *("time / little memory", "peak, MiB", "peak / end-to-end", "peak / little memory"),
        "peak / largest module",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row.modules),
            row.contestant,
            f"{row.first_step:.1f}",
            spread(row.milliseconds, 1),
            spread(row.time_to_end_to_end),
            optional(row.flops_to_end_to_end, 2),
            spread(row.time_to_handwritten) if row.time_to_handwritten else "",
            spread(row.time_to_little_memory),
            f"{row.peak / 2**20:.1f}",
            f"{row.memory_to_end_to_end:.3f}",
            optional(row.memory_to_little_memory, 3),
            f"{row.memory_to_largest_module:.3f}",
        )
    console.print(table)


def optional(figure: float | None, digits: int) -> str:
    """Format a figure, if there is one."""
    return "" if figure is None else f"{figure:.{digits}f}"


def spread(timing: Timing, digits: int = 2) -> str:
    """Format a median with its extremes."""
    return f"{timing.median:.{digits}f} ({timing.low:.{digits}f} to {timing.high:.{digits}f})"


def environment(processor: bool) -> dict[str, object]:
    """Describe what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "times": "of the processor" if processor else "of the clock",
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("-k", "--modules", type=int, nargs="+", default=[1, 4, 12], help="divisors of 12")
    parser.add_argument("--rounds", type=int, default=15, help="at most, and at least three")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which there are no more rounds")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; its own choice by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there as well")
    parser.add_argument(
        "--processor",
        action="store_true",
        help="time the processor and not the clock: for one thread on a busy machine",
    )
    parser.add_argument(
        "--inductor", type=int, nargs="+", metavar="K", help="where locc is compiled; at the largest K"
    )
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--without-locc", action="store_true", help="compare the references alone")
    options = parser.parse_args(argv)
    options.models = options.models or list(DEFAULT)
    unknown = [name for name in options.models if name not in WORKLOADS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    if any(k < 1 or 12 % k for k in options.modules):
        parser.error("the twelve blocks divide into 1, 2, 3, 4, 6 or 12 modules")
    if options.eager or not compiles():
        options.inductor = []
    elif options.inductor is None:
        options.inductor = [max(options.modules)]
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    # After many steps on one batch gradients are so small that they slow the CPU.
    torch.set_flush_denormal(True)
    console = Console()
    console.width = max(console.width, 240)  # a narrow terminal would cut the figures off
    console.print(
        ", ".join(f"{key} {value}" for key, value in environment(options.processor).items()), highlight=False
    )
    rows: list[Row] = []
    began = time.perf_counter()
    for number, name in enumerate(options.models, 1):
        until = began + 60 * options.minutes * number / len(options.models)
        found = measure(WORKLOADS[name], options, until)
        show(console, found)
        rows += found
        if options.json:
            data = {"environment": environment(options.processor), "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(data, indent=2) + "\n")
    console.print(
        "Median of interleaved rounds (fastest to slowest). End-to-end: for times the faster of eager and "
        "compiled, for memory the one that is compiled where the contestant is. Little memory: the "
        "end-to-end one. Peak: activations and gradients above what lives between two steps (of what is "
        "compiled: all that is allocated); the largest module's is measured with that module training alone, "
        "compiled as well, on its recorded input."
    )


if __name__ == "__main__":
    main()
