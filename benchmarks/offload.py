"""Training that does not fit in memory: `compile(..., offload="disk")`.

`python -m benchmarks.offload limited disk FOLDER` builds, compiles, trains, diagnoses and evaluates a model,
and saves and exports it to FOLDER, under a limit of an eighth of what parameters and optimizer state take.
With `--resume` it goes on from there, with a model that is built on the meta device; `limited memory FOLDER`
does without `offload=`. The limit is on what RLIMIT_DATA counts, memory that no file backs, beyond what the
process has after it has done the same with something small. RLIMIT_DATA counts freed memory that the C
library keeps, too: run it with MALLOC_MMAP_THRESHOLD_=65536, which gives that back.

`python -m benchmarks.offload times` measures what it costs where there is memory enough: eight batches with
`offload=` against as many without, in turn.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import locc
from benchmarks.meter import Timing

WIDTH, DEPTH, SHARE, BATCHES = 1536, 24, 8, 8
TIMED = 768
"""The width of what is timed: all of it is in memory, many times."""


def network(depth: int = DEPTH, width: int = WIDTH) -> nn.Sequential:
    """Build equal linear layers."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth))
    return nn.Sequential(*blocks, nn.Linear(width, 10))


def compiled(
    depth: int = DEPTH,
    offload: str | None = None,
    meta: bool = False,
    width: int = WIDTH,
    **options: Any,
) -> locc.Program:
    """Compile them with `dgl` and Adam, each a module."""
    in_files = nullcontext() if offload is None else locc.deferred(offload)
    with torch.device("meta") if meta else in_files:
        model = network(depth, width)
    return locc.compile(
        model,
        "dgl",
        [str(i) for i in range(depth)],
        example_inputs=batch(0, width)[0],
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-4, fused=True),
        seed=0,
        offload=offload,
        **options,
    )


def batch(seed: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Return inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, width, generator=generator), torch.randint(10, (8,), generator=generator)


def used(key: str) -> int:
    """Return bytes of this process, by their name in /proc/self/status."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def limited(place: str | None, folder: Path, resume: bool) -> None:
    """Build, compile and train two steps in little memory."""
    _all_of_it(compiled(1, place, resume), folder / "small", False)
    before = used("VmData")
    with torch.device("meta"):
        size = 3 * sum(p.nbytes for p in network().parameters())  # Adam has two numbers for each
    limit = before + size // SHARE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(f"parameters and optimizer state: {size >> 20} MiB; limit: {size // SHARE >> 20} MiB", flush=True)
    program = compiled(offload=place, meta=resume)
    print(f"compiled; used: {used('VmData') - before >> 20} MiB", flush=True)
    print("\n".join(_all_of_it(program, folder / "large", resume)))
    print(f"used: {used('VmData') - before >> 20} MiB", flush=True)


def _all_of_it(program: locc.Program, folder: Path, resume: bool) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        program.load(folder / "state")
    said = [f"loss {float(program.step(*batch(program.steps)).loss)}" for _ in range(2)]
    said += [diagnosed(program), f"evaluated: {program.evaluate([batch(-1)])}"]
    program.forecast(*batch(-1), ranks=2, batches=10)
    program.save(folder / "state")
    program.export_onnx_modules(folder / "modules")
    program.export_onnx(folder / "model.onnx")
    return said


def diagnosed(program: locc.Program) -> str:
    """Return the angles that a step has to the true gradient."""
    return f"angles: {[health.angle for health in program.diagnose([batch(-1)], steps=1).owners]}"


def times(rounds: int) -> None:
    """Print the ratios of times within a round."""
    batches = [batch(seed, TIMED) for seed in range(BATCHES)]

    def seconds(program: locc.Program) -> float:
        start = time.perf_counter()
        if program.settings.wave:
            program.wave(batches)
        else:
            for x, y in batches:
                program.step(x, y)
        return time.perf_counter() - start

    for schedule in ("lockstep", "wave"):
        pair = [
            compiled(schedule=schedule, offload=place, verify=False, width=TIMED) for place in ("disk", None)
        ]
        for program in pair:
            seconds(program)
        found = Timing.of([seconds(pair[0]) / seconds(pair[1]) for _ in range(rounds)])
        print(f"{schedule}: {found.median:.2f} ({found.low:.2f} to {found.high:.2f})", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("limited")
    one.add_argument("place", help="memory, disk or a folder")
    one.add_argument("folder", type=Path)
    one.add_argument("--resume", action="store_true")
    kinds.add_parser("times").add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    if given.kind == "times":
        times(given.rounds)
        return
    limited(None if given.place == "memory" else given.place, given.folder, given.resume)


if __name__ == "__main__":
    main()
