"""`make bench-gpu`: what local training costs and saves on a GPU, by backend, beside end to end and by hand.

Each contestant is built, warmed up, measured and dropped before the next one is built, for together they
would not fit. All have Adam, fused, under autocast to bfloat16. Memory is the allocator's: the peak of a step
above what lives between two steps, and the most that it ever held of the device, parameters, optimizer state
and the pools of CUDA graphs included (a replay allocates nothing: of graphs only the latter tells). Launches
are those of kernels, graphs, copies and fills in one step.

The last table trains with `offload="cpu"` what takes four times the memory that this process may use.

`--device cpu --tiny` runs all of it on small models on the CPU, where the figures say nothing of a GPU:
graphs, the allocator's figures and offloading to host memory are left out, and operators are counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import locc
from benchmarks.contestants import boundary_widths
from benchmarks.handwritten import DetachLoop, EndToEnd
from benchmarks.meter import Timing, interleave, peak_memory
from benchmarks.models import (
    WORKLOADS,
    Chain,
    Workload,
    gpt,
    linear_head,
    mlp,
    pooled_head,
    resnet50,
    segments,
    splits,
    token_loss,
    vocabulary_head,
)
from benchmarks.run import environment, spread

BACKENDS = ("eager", "inductor", "cudagraphs")
WARMUP = 5
"""Steps before one is measured: the third is recorded, and inductor compiles again when sizes are free."""
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")

Step = Callable[[], object]


def large() -> list[Workload]:
    """Return the models of a size that a GPU is for."""
    words = 50257
    return [
        replace(WORKLOADS["mlp"], model=partial(mlp, 4096), batch=_batch((4096, 4096), 10), head=linear_head),
        Workload(
            "resnet-50",
            resnet50,
            _batch((128, 3, 224, 224), 1000),
            F.cross_entropy,
            partial(pooled_head, classes=1000),
            feature_axis=1,
        ),
        Workload(
            "gpt-2 small",
            partial(gpt, 768, words, 1024, heads=12),
            lambda: (torch.randint(words, (8, 1024)), torch.randint(words, (8, 1024))),
            token_loss,
            partial(vocabulary_head, vocabulary=words),
            feature_axis=-1,
        ),
    ]


def tiny() -> list[Workload]:
    """Return the same kinds of models, small."""
    return [
        replace(WORKLOADS["mlp"], model=partial(mlp, 16), batch=_batch((4, 16), 10)),
        replace(
            WORKLOADS["resnet"],
            name="resnet-50",
            model=partial(resnet50, 4, 10),
            batch=_batch((2, 3, 32, 32), 10),
        ),
        replace(WORKLOADS["gpt"], name="gpt-2 small", model=partial(gpt, 16)),
    ]


def _batch(shape: tuple[int, ...], classes: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(shape), torch.randint(classes, shape[:1]))


@dataclass(frozen=True)
class Row:
    """What one contestant cost; bytes."""

    model: str
    modules: int
    contestant: str
    milliseconds: Timing
    time_to_end_to_end: float
    peak: int
    held: int
    launches: int


def contestants(
    workload: Workload, counts: Sequence[int], backends: Sequence[str], device: str
) -> Iterator[tuple[int, str, Callable[[], Step]]]:
    """Yield number of modules, name, and what builds the step of each contestant."""

    def model() -> tuple[Chain, Tensor, Tensor]:
        torch.manual_seed(0)
        chain, (x, y) = workload.model(), workload.batch()
        return chain.to(device), x.to(device), y.to(device)

    def by_hand(modules: int) -> Step:
        chain, x, y = model()
        trainer: EndToEnd | DetachLoop = EndToEnd(chain, workload.loss)
        if modules > 1:
            parts = segments(chain, modules)
            heads = [workload.head(width).to(device) for width in boundary_widths(workload, parts, x)]
            trainer = DetachLoop(parts, heads, workload.loss)
        return partial(cast, device, partial(trainer.step, x, y))

    def compiled(modules: int, backend: str) -> Step:
        chain, x, y = model()

        def head(boundary: Any, _output: Any) -> nn.Module:
            return workload.head(boundary.shape[workload.feature_axis])

        program = locc.compile(
            chain,
            "dgl" if modules > 1 else "bp",
            splits(modules, len(chain.blocks)),
            loss=workload.loss,
            example_inputs=x[:2],
            optimizer=locc.Recipe(),
            autocast="bfloat16",
            backend=backend,
            **({"head": head} if modules > 1 else {}),
        )
        return partial(program.step, x, y)

    for modules in counts:
        yield modules, "by hand", partial(by_hand, modules)
        for backend in backends:
            yield modules, f"locc, {backend}", partial(compiled, modules, backend)


def cast(device: str, step: Step) -> object:
    """Take a step under autocast."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        return step()


def measure(workload: Workload, counts: Sequence[int], rounds: int, device: str) -> Iterator[Row]:
    """Yield a row for each contestant, end to end by hand first."""
    cuda, first = torch.device(device).type == "cuda", 0.0
    for modules, name, build in contestants(workload, counts, BACKENDS if cuda else BACKENDS[:1], device):
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        step = build()
        found = Timing.of(interleave({name: step}, rounds, WARMUP)[name])
        first = first or found.median
        held = torch.cuda.max_memory_reserved(device) if cuda else 0
        yield Row(
            workload.name,
            modules,
            name,
            found,
            found.median / first,
            peak_memory(step, device),
            held,
            launches(step, cuda),
        )
        del step


def launches(step: Step, cuda: bool) -> int:
    """Return how often a step asks the device for something; without one, how many operators it calls."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        step()
        if cuda:
            torch.cuda.synchronize()
    names = [event.name for event in seen.events() or ()]
    return sum(name.startswith(LAUNCHES if cuda else ("aten::",)) for name in names)


def offloaded(device: str, limit: int, width: int, rounds: int) -> str:
    """Train what takes four times `limit` bytes, and say what a batch took and used of the device.

    On the CPU there is no such limit, and what waits is in files.
    """
    cuda = torch.device(device).type == "cuda"
    layer = 2 * 4 * width * width * 3  # with its head, and the two states of Adam, in float32
    depth = 4 * limit // layer
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)))
    batches = [(torch.randn(256, width), torch.randn(256, width)) for _ in range(8)]
    if cuda:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total, device)
        torch.cuda.reset_peak_memory_stats(device)
    program = locc.compile(
        model,
        "dgl",
        [str(i) for i in range(depth - 1)],
        loss="mse",
        example_inputs=batches[0][0],
        optimizer=locc.Recipe(),
        schedule="wave",
        offload="cpu" if cuda else "disk",
        head="linear",
        verify=False,
    )
    times = {}
    for size in (1, len(batches)):
        program.wave(batches[:size])
        start = time.perf_counter()
        for _ in range(rounds):
            program.wave(batches[:size])  # ends when all is back
        times[size] = (time.perf_counter() - start) / rounds / size * 1e3
    text = ", ".join(f"{ms:.1f} ms a batch in waves of {size}" for size, ms in times.items())
    used = f"{torch.cuda.max_memory_reserved(device) / 2**20:.0f} MiB of the device" if cuda else "files"
    whole = sum(p.nbytes for p in program.root.parameters()) * 3
    return f"{depth} layers of {whole / 2**20:.1f} MiB, a limit of {limit / 2**20:.1f} MiB: {text}; {used}"


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the rows of one model."""
    table = Table(title=rows[0].model, title_justify="left")
    for column in ("K", "contestant", "step, ms", "to end to end", "peak, MiB", "held, MiB", "launches"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for row in rows:
        table.add_row(
            *(str(row.modules), row.contestant, spread(row.milliseconds), f"{row.time_to_end_to_end:.2f}"),
            *(f"{row.peak / 2**20:.1f}", f"{row.held / 2**20:.0f}", str(row.launches)),
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=description)
    parser.add_argument("-k", "--modules", type=int, nargs="+", default=[1, 2, 4, 12], help="1 is end to end")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the benchmark itself")
    parser.add_argument("--limit", type=int, default=2048, help="MiB of the device for the offloaded model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there as well")
    options = parser.parse_args(argv)
    cuda = torch.device(options.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny tries the benchmark on the CPU")
    console = Console()
    console.width = max(console.width, 120)
    name = {"device": torch.cuda.get_device_name(options.device)} if cuda else {}
    console.print(", ".join(f"{k} {v}" for k, v in (environment(False) | name).items()), highlight=False)
    rows: list[Row] = []
    for workload in tiny() if options.tiny else large():
        found = list(measure(workload, sorted({1, *options.modules}), options.rounds, options.device))
        show(console, found)
        rows += found
    limit, width = (1 << 18, 64) if options.tiny else (options.limit << 20, 4096)
    told = offloaded(options.device, limit, width, options.rounds)
    console.print(told, highlight=False)
    if options.json:
        data = {
            "environment": environment(False) | name,
            "rows": [asdict(row) for row in rows],
            "offload": told,
        }
        options.json.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
