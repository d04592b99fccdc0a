"""What the tests of several processes train, and where they are cut."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import locc
from locc.callbacks import Callback
from locc.runtime import folder
from runtime.turns import every_other, network
from support import batch

SPLITS = ["0", "1", "2"]


def loader() -> Any:
    x = torch.randn(22, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, torch.arange(22) % 3), 4, shuffle=True)


def program_of(method: str, schedule: str, rank: int = 0, **options: Any) -> locc.Program:
    if schedule == "pipelined":
        options.setdefault("timeout", 20.0)
    model = network(3).to(options.pop("device", "cpu"))
    with torch.no_grad():
        model[0][0].weight.add_(rank)  # all start from what rank 0 has
    return every_other(model, method, schedule=schedule, **options)


def stored(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, of a file or a folder."""
    found = {n: t for part in folder.parts(path) or [path] for n, t in load_file(part).items()}
    return {name: tensor for name, tensor in found.items() if name != "locc"}


class After(Callback):
    """Stops a fit after so many steps of the program; takes part on rank 0 alone."""

    def __init__(self, steps: int, interrupt: bool) -> None:
        self.steps, self.interrupt = steps, interrupt

    def on_step_end(self, fit: Any, report: Any) -> None:
        if fit.program.steps == self.steps:
            os.kill(os.getpid(), signal.SIGINT) if self.interrupt else fit.stop("enough")

    def on_epoch_end(self, fit: Any, epoch: Any) -> None:
        fit.program.whole()


def cut(rank: int, file: str, steps: int, start: str = "", interrupt: bool = False) -> Any:
    """As `fitted`, but stopped after so many steps."""
    torch.manual_seed(0)
    program = program_of("dgl", "pipelined", rank)
    if start:
        program.load(start)
    history = program.fit(
        loader(), 4, progress=False, callbacks=[After(steps, interrupt)], validation=[batch(5)],
        scheduler_interval="step",
    )  # fmt: skip
    program.save(file)
    return program.steps, history.stopped, history.interrupted
