"""`make bench`: step time and peak memory of local training against end-to-end backpropagation.

Contestants train copies of one model on one batch, in turn: eager end-to-end backpropagation; the same with
checkpoints at every block and the optimizer inside of the backward pass, which is how one trains end to end
in little memory; a detach loop written by hand; and locc's `dgl` with the same heads, with cheaper heads
where there are some, and with these in little memory (updates in the backward pass, and some activations
computed again where that pays). All have Adam, fused. Times are the median of the rounds, with the fastest
and the slowest; a ratio is taken within each round. Beside it is the arithmetic: the ratio of the floating-
point operations in matrix products, convolutions and attention, which is what the time would be if nothing
else took any.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.handwritten import DetachLoop, EndToEnd, LittleMemory
from benchmarks.meter import Peak, Timing, flops, gradients_of, interleave, peak, ratio
from benchmarks.models import DEFAULT, WORKLOADS, Chain, Workload, segments, splits

END_TO_END, LITTLE, HANDWRITTEN, LOCC = "end-to-end", "end-to-end, little memory", "handwritten", "locc dgl"
CHEAP, SMALL = "locc dgl, cheap heads", "locc dgl, little memory"


@dataclass(frozen=True)
class Row:
    """What one contestant at one K cost."""

    model: str
    modules: int
    contestant: str
    milliseconds: Timing
    time_to_end_to_end: Timing
    time_to_handwritten: Timing | None
    time_to_little_memory: Timing
    flops_to_end_to_end: float
    peak: Peak
    memory_to_end_to_end: float
    memory_to_little_memory: float
    memory_to_largest_module: float


@dataclass(frozen=True)
class Contestant:
    """One way to take a training step, and the parameters whose gradients it makes."""

    modules: int
    label: str
    step: Callable[[], object]
    parameters: Sequence[Tensor]


def end_to_end(workload: Workload, model: Chain, x: Tensor, y: Tensor) -> Contestant:
    """Plain backpropagation."""
    trainer = EndToEnd(model, workload.loss)
    return Contestant(1, END_TO_END, lambda: trainer.step(x, y), gradients_of(model))


def little_memory(workload: Workload, model: Chain, x: Tensor, y: Tensor) -> Contestant:
    """Backpropagation with checkpoints, and updates in the backward pass."""
    trainer = LittleMemory(model, workload.loss)
    return Contestant(1, LITTLE, lambda: trainer.step(x, y), gradients_of(model))


def handwritten(workload: Workload, model: Chain, x: Tensor, y: Tensor, modules: int) -> Contestant:
    """The detach loop."""
    parts = segments(model, modules)
    heads = [workload.head(width) for width in boundary_widths(workload, parts, x)]
    trainer = DetachLoop(parts, heads, workload.loss)
    return Contestant(modules, HANDWRITTEN, lambda: trainer.step(x, y), gradients_of(model, *heads))


def compiled(
    workload: Workload, model: Chain, x: Tensor, y: Tensor, modules: int, label: str = LOCC
) -> Contestant:
    """The same through locc; by another label with other heads, or in little memory."""
    import locc  # here, so that --without-locc runs where locc does not import

    def head(boundary: Any, _output: Any) -> nn.Module:
        return workload.head(boundary.shape[workload.feature_axis])

    options: dict[str, Any] = {"head": head}
    if label != LOCC and workload.heads is not None:
        options = dict(workload.heads)
    if label == SMALL:
        options |= {"update": "in_backward", "recompute": workload.recompute}
    program = locc.compile(
        model,
        method="dgl",
        splits=splits(modules),
        loss=workload.loss,
        example_inputs=x,
        optimizer=locc.Recipe(),  # fused Adam, as the references have
        **options,
    )
    return Contestant(modules, label, lambda: program.step(x, y), gradients_of(program))


def boundaries(parts: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return the value at each boundary, without leaving a trace in the parts' buffers."""
    values = []
    with torch.no_grad():
        for part in copy.deepcopy(list(parts))[:-1]:
            x = part(x)
            values.append(x)
    return values


def boundary_widths(workload: Workload, parts: Sequence[nn.Module], x: Tensor) -> list[int]:
    """Return the width of each boundary."""
    return [value.shape[workload.feature_axis] for value in boundaries(parts, x)]


def largest_module(workload: Workload, model: Chain, x: Tensor, y: Tensor, modules: int) -> int:
    """Return the peak of the most expensive module when each trains alone on its recorded input.

    As in the chain, a module holds its input, and its output, which it hands on.
    """
    parts = segments(copy.deepcopy(model), modules)
    inputs = [x, *boundaries(parts, x)]
    heads = [workload.head(width) for width in boundary_widths(workload, parts, x)]
    peaks = []
    for part, head, entering in zip(parts, [*heads, nn.Identity()], inputs, strict=True):
        optimizer = torch.optim.Adam([*part.parameters(), *head.parameters()], fused=True)
        step = partial(alone, part, head, optimizer, workload.loss, None if entering is x else entering, x, y)
        step()  # the optimizer's state exists only after the first step
        peaks.append(peak(step, gradients_of(part, head)).total)
    return max(peaks)


def alone(
    part: nn.Module,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    entering: Tensor | None,
    x: Tensor,
    y: Tensor,
) -> Tensor:
    """Train one module on its input and return its output; the batch itself counts for nobody."""
    output = part(x if entering is None else entering.clone())
    loss(head(output), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return output.detach()


def contestants(workload: Workload, counts: Sequence[int], with_locc: bool) -> list[Contestant]:
    """Build all contestants on copies of one model."""
    torch.manual_seed(0)
    model = workload.model()
    x, y = workload.batch()
    entered = [make(workload, copy.deepcopy(model), x, y) for make in (end_to_end, little_memory)]
    for modules in counts:
        entered.append(handwritten(workload, copy.deepcopy(model), x, y, modules))
        for label in (LOCC, *([CHEAP] if workload.heads else []), SMALL) if with_locc else ():
            entered.append(compiled(workload, copy.deepcopy(model), x, y, modules, label))
    return entered


def measure(workload: Workload, counts: Sequence[int], rounds: int, with_locc: bool) -> list[Row]:
    """Run one workload and return a row for each contestant."""
    entered = contestants(workload, counts, with_locc)
    names = [f"{c.label} K={c.modules}" for c in entered]
    times = interleave({name: c.step for name, c in zip(names, entered, strict=True)}, rounds)
    peaks = [peak(c.step, c.parameters) for c in entered]
    operations = [flops(c.step) for c in entered]
    torch.manual_seed(0)
    model, (x, y) = workload.model(), workload.batch()
    largest = {1: peaks[0].total} | {k: largest_module(workload, model, x, y, k) for k in counts}
    return [
        Row(
            workload.name,
            contestant.modules,
            contestant.label,
            Timing.of(times[name]),
            ratio(times, name, names[0]),
            ratio(times, name, f"{HANDWRITTEN} K={contestant.modules}") if contestant.label == LOCC else None,
            ratio(times, name, names[1]),
            done / operations[0],
            used,
            used.total / peaks[0].total,
            used.total / peaks[1].total,
            used.total / largest[contestant.modules],
        )
        for contestant, name, used, done in zip(entered, names, peaks, operations, strict=True)
    ]


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the rows of one workload."""
    table = Table(title=f"{rows[0].model}: 12 blocks", title_justify="left")
    table.add_column("K", justify="right")
    table.add_column("contestant")
    for column in (
        *("step, ms", "time / end-to-end", "arithmetic / end-to-end", "time / handwritten"),
        *("time / little memory", "peak, MiB", "peak / end-to-end", "peak / little memory"),
        "peak / largest module",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row.modules),
            row.contestant,
            spread(row.milliseconds, 1),
            spread(row.time_to_end_to_end),
            f"{row.flops_to_end_to_end:.2f}",
            spread(row.time_to_handwritten) if row.time_to_handwritten else "",
            spread(row.time_to_little_memory),
            f"{row.peak.total / 2**20:.1f}",
            f"{row.memory_to_end_to_end:.3f}",
            f"{row.memory_to_little_memory:.3f}",
            f"{row.memory_to_largest_module:.3f}",
        )
    console.print(table)


def spread(timing: Timing, digits: int = 2) -> str:
    """Format a median with its extremes."""
    return f"{timing.median:.{digits}f} ({timing.low:.{digits}f} to {timing.high:.{digits}f})"


def environment() -> dict[str, object]:
    """Describe what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("-k", "--modules", type=int, nargs="+", default=[2, 4, 12], help="divisors of 12")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; its own choice by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there as well")
    parser.add_argument("--without-locc", action="store_true", help="compare the references alone")
    options = parser.parse_args(argv)
    options.models = options.models or list(DEFAULT)
    unknown = [name for name in options.models if name not in WORKLOADS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    if any(k < 2 or 12 % k for k in options.modules):
        parser.error("the twelve blocks divide into 2, 3, 4, 6 or 12 modules")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    console.width = max(console.width, 240)  # a narrow terminal would cut the figures off
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()), highlight=False)
    rows: list[Row] = []
    for name in options.models:
        found = measure(WORKLOADS[name], options.modules, options.rounds, not options.without_locc)
        show(console, found)
        rows += found
    console.print(
        f"Median of {options.rounds} interleaved rounds (fastest to slowest). "
        "Little memory: the end-to-end one. Peak: activations and gradients above what lives between two "
        "steps; the largest module's is measured with that module training alone on its recorded input."
    )
    if options.json:
        data = {"environment": environment(), "rounds": options.rounds, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
