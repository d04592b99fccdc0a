"""Runs a function in several processes that torch.distributed knows, for tests."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 60.0
PRELOAD = ["locc.compiler", "locc_passes", "support", "torch._dynamo", "torch._inductor", "torch.onnx"]
PRELOAD += ["torch.distributed.checkpoint"]
"""What a compilation and a checkpoint import: once, for all processes."""


class Died(Exception):
    """A process ended without a result."""


def together(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `work(rank, *args)` returns or raises in each of `size` processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_work, args=(rank, size, folder, work, args), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
            process.kill()
        return [_result(folder / str(rank)) for rank in range(size)]


def _result(file: Path) -> Any:
    return pickle.loads(file.read_bytes()) if file.exists() else Died()


def _work(rank: int, size: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        result = work(rank, *args)
    except BaseException as error:
        result = type(error)(str(error)) if isinstance(error, Exception) else error
        traceback.print_exc()
    (folder / str(rank)).write_bytes(pickle.dumps(result))
