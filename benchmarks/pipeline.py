"""Ranks that train at the same time: `python -m benchmarks.pipeline`.

First, a chain whose modules only wait, so that a machine with few cores shows the schedule of many: the time
of a pass over n batches on K ranks, beside what `program.forecast` says and beside the end-to-end pipeline of
`torch.distributed.pipelining` (1F1B, which empties itself for every batch). Then, an MLP on two ranks of one
thread each, beside one process of one thread and beside the slower rank alone, without any communication.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy

import locc
from locc.lower import project
from locc.runtime.machine import Held

MICRO = 8
"""Parts of a batch in the end-to-end pipeline."""


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, seconds: float) -> Tensor:
        context.seconds = seconds * len(x)
        time.sleep(context.seconds)
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        time.sleep(2 * context.seconds)  # as a layer's backward pass takes twice its forward pass
        return gradients[0], None


class Waits(nn.Module):
    """A layer that takes a given time a sample, whatever the machine."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layer, self.seconds = nn.Linear(8, 8), seconds

    def forward(self, x: Tensor) -> Tensor:
        """Return a linear map of x [B, 8]."""
        found: Tensor = _Wait.apply(self.layer(x), self.seconds)
        return found


def waiting(modules: int, seconds: float) -> nn.Sequential:
    """Return a chain of modules that take `seconds` a sample forward, and twice that backward."""
    return nn.Sequential(*[Waits(seconds) for _ in range(modules)])


def perceptron(width: int, layers: int) -> nn.Sequential:
    """Return `layers` layers of `width` units, the last one linear."""
    hidden = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers - 1)]
    return nn.Sequential(*hidden, nn.Linear(width, width))


def compiled(model: nn.Module, x: Tensor, schedule: str) -> locc.Program:
    """Compile one module for each layer."""
    splits = [str(i) for i in range(len(list(model.children())) - 1)]
    return locc.compile(
        model, "dgl", splits, example_inputs=x[:4], schedule=schedule, verify=False, seed=0,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    )  # fmt: skip


def together(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `work(rank, size, *args)` returns in each of `size` processes of one thread."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, size, folder, work, args) for rank in range(size)]
        processes = [context.Process(target=_work, args=one) for one in given]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit("a rank failed")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]


def _work(rank: int, size: int, folder: str, work: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(work(rank, size, *args)))
    dist.barrier()


def timed(step: Callable[[], Any], batches: int) -> float:
    """Return the seconds that the slowest rank takes for so many steps, all starting at once."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(batches):
        step()
    seconds = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def schedules(rank: int, size: int, batches: int, seconds: float, batch: int) -> dict[str, float]:
    """Return the seconds of a pass on this many ranks: in locc's pipeline, forecast, and end to end."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 8), torch.randint(8, (batch,))
    program = compiled(waiting(size, seconds), x, "pipelined")
    expected = compiled(waiting(size, seconds), x, "lockstep").forecast(x, y, ranks=size, batches=batches)
    program.step(x, y)
    local = timed(lambda: program.step(x, y), batches)
    part = waiting(size, seconds)[rank]
    stage = PipelineStage(part, rank, size, torch.device("cpu"))
    pipeline = Schedule1F1B(stage, MICRO, loss_fn=cross_entropy)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.01)

    def end_to_end() -> None:
        pipeline.step(*([x] if rank == 0 else []), **({"target": y} if rank == size - 1 else {}))
        optimizer.step()
        optimizer.zero_grad()

    end_to_end()
    return {"pipelined": local, "forecast": expected.seconds, "1F1B": timed(end_to_end, batches)}


def throughput(
    rank: int, size: int, batches: int, rounds: int, width: int, batch: int
) -> dict[str, list[float]]:
    """Return seconds a step, round by round: on one process, pipelined, and of ranks that never wait."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, width), torch.randint(width, (batch,))
    one = compiled(perceptron(width, 4 * size), x, "lockstep")
    program = compiled(perceptron(width, 4 * size), x, "pipelined")
    program.step(x, y)
    assert program.ranks is not None
    plan, known = one.plan(), Held()
    mine, executor, values = program.ranks.owners, one.built.executor, one.bind(x, y)
    for owners in ([o for o in one.ir.owners if o not in mine], mine):
        if owners[0] == next(iter(one.ir.owners)) or rank:
            executor.run(project(plan, owners), values, 0, known)
    part = project(plan, mine)
    found: dict[str, list[float]] = {"one process": [], "pipelined": [], "ceiling": []}
    for _ in range(rounds):
        found["one process"].append(timed(lambda: one.step(x, y) if rank == 0 else None, batches) / batches)
        found["pipelined"].append(timed(lambda: program.step(x, y), batches) / batches)
        found["ceiling"].append(timed(lambda: executor.run(part, values, 0, known), batches) / batches)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Ranks that train at the same time.")
    parser.add_argument("--ranks", default="2,4,8", help="of the chain that waits")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of a module's forward pass")
    parser.add_argument("--rounds", type=int, default=5, help="of the MLP")
    parser.add_argument("--width", type=int, default=768, help="of the MLP")
    parser.add_argument(
        "--steps", type=int, default=100, help="of the MLP, a round; the first of them fills the pipeline"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the passes there as well")
    options = parser.parse_args()
    print(f"modules that wait, {options.batches} batches; seconds of a pass")
    print("| ranks | pipelined | forecast | n + K - 1 steps | 1F1B, 8 micro-batches |")
    print("|---:|---:|---:|---:|---:|")
    passes = []
    for size in map(int, options.ranks.split(",")):
        takes, batch = options.milliseconds / 1e3, 16
        (found, *_) = together(size, schedules, options.batches, takes / batch, batch)
        ideal = (options.batches + size - 1) * 3 * takes
        row = [found["pipelined"], found["forecast"], ideal, found["1F1B"]]
        passes.append({"ranks": size, "ideal": ideal, **found})
        print(f"| {size} | " + " | ".join(f"{seconds:.2f}" for seconds in row) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(passes, indent=2) + "\n")
    (found, *_) = together(2, throughput, options.steps, options.rounds, options.width, 256)
    print("an MLP of 8 layers, a thread a process; milliseconds a step, median of rounds (lowest to highest)")
    for name, each in found.items():
        milliseconds = sorted(1e3 * s for s in each)
        print(
            f"{name}: {statistics.median(milliseconds):.1f} ({milliseconds[0]:.1f} to {milliseconds[-1]:.1f})"
        )
    for base in ("one process", "ceiling"):
        ratios = [a / b for a, b in zip(found[base], found["pipelined"], strict=True)]
        middle = statistics.median(ratios)
        print(f"throughput over {base}: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
