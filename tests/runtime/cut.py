"""Fits that are cut, and how; as a script, some that a signal cuts from outside.

    python cut.py FOLDER

runs each of `SIGNALS` in a process of its own, forked, and leaves its checkpoint in FOLDER.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import locc
from locc import Program
from locc.runtime.history import History
from runtime.turns import Probing, norms
from support import batch

LR = torch.optim.lr_scheduler


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Draws from all three of the generators that a data set may draw from."""

    def __init__(self) -> None:
        self.x, self.y = batch(10)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return self.x[index] + 0.1 * drawn, self.y[index]


def shuffled(seed: int) -> DataLoader[Any]:
    return DataLoader(Augmented(), 4, shuffle=True)


def by_its_own_generators(seed: int) -> DataLoader[Any]:
    first, second = (torch.Generator().manual_seed(seed + i) for i in range(2))
    data = Augmented()
    return DataLoader(data, 4, sampler=RandomSampler(data, generator=first), generator=second)


def by_workers(seed: int) -> DataLoader[Any]:
    return DataLoader(Augmented(), 4, shuffle=True, num_workers=2)


def validation() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch(5)), 5, shuffle=True)  # it draws as well


@dataclass(frozen=True)
class Scene:
    """A program, its loader (of a seed), and how `fit` is called; a pass has three batches."""

    loader: Callable[[int], DataLoader[Any]] = shuffled
    options: dict[str, Any] = field(default_factory=dict)
    fitting: dict[str, Any] = field(default_factory=dict)
    epochs: int = 2
    method: Any = field(default_factory=Probing)

    def program(self) -> Program:
        torch.manual_seed(3)
        options = {"seed": 1, "verify": False, "example_inputs": batch(4)[0], **self.options}
        return locc.compile(norms(), self.method, ["a", "b"], **options)

    def fit(self, program: Program, loader: Any, **options: Any) -> History:
        options = {"validation": validation(), "progress": False, **self.fitting, **options}
        return program.fit(loader, self.epochs, **options)


SCENES = {
    "lockstep": Scene(
        options={
            "optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
            "scheduler": lambda o: LR.StepLR(o, 1, 0.7),
        }
    ),
    "sequential": Scene(
        by_its_own_generators,
        {
            "schedule": "sequential",
            "optimizer": lambda ps: torch.optim.Adam(ps, lr=0.05),
            "scheduler": lambda o: LR.ReduceLROnPlateau(o, patience=0),
        },
    ),
    "atomic": Scene(
        options={
            "atomic": True,
            "accumulate": 2,
            "optimizer": lambda ps: torch.optim.Adam(ps, lr=0.05),
            "scheduler": lambda o: LR.ExponentialLR(o, 0.95),
        },
        fitting={"scheduler_interval": "step"},
    ),
    "waves": Scene(
        options={
            "schedule": "wave",
            "batches": 2,
            "optimizer": lambda ps: torch.optim.Adam(ps, lr=0.05),
            "scheduler": lambda o: LR.ExponentialLR(o, 0.95),
        },
        fitting={"scheduler_interval": "step"},
        method="dgl",
    ),
    "workers": Scene(by_workers, epochs=1),
    "without data": Scene(
        options={
            "optimizer": lambda ps: torch.optim.Adam(ps, lr=0.05),
            "scheduler": lambda o: LR.ExponentialLR(o, 0.95),
        },
        fitting={"scheduler_interval": "step"},
        method=locc.method("al", warmup=5),
    ),
}


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Cut:
    """Has something happen once at a place, as soon as a program has made some steps."""

    def __init__(self, program: Program) -> None:
        self.program, self.steps, self.place = program, 0, ""
        self.what: Callable[[], None] = lambda: None
        program.model.a.register_forward_pre_hook(lambda *_: self.at("early in a step"))
        for optimizer in program.optimizers.values():
            optimizer.register_step_post_hook(lambda *_: self.at("late in a step"))

    def set(self, steps: int, place: str, what: Callable[[], None]) -> None:
        self.steps, self.place, self.what = steps, place, what

    def at(self, place: str) -> None:
        evaluating = place == "early in a step" and not self.program.model.training
        if place == self.place and self.program.steps >= self.steps and not evaluating:
            self.place = ""
            self.what()

    def watched(self, loader: Any, place: str) -> Any:
        """The loader, in which `place` is before each batch."""
        return _Watched(loader, lambda: self.at(place))


@dataclass
class _Watched:
    inner: Any
    before: Callable[[], None]

    def __iter__(self) -> Iterator[Any]:
        for item in self.inner:
            self.before()
            yield item

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


# ---- as a script -------------------------------------------------------------------------------


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    os.killpg(0, signal.SIGINT)  # what a terminal does at Ctrl-C: the workers of a loader get it as well


SIGNALS = {
    "killed between two batches of a warm-up": ("lockstep", 4, "in the loader", killed),
    "killed within a step of a sequential stage": ("sequential", 28, "late in a step", killed),
    "killed within an accumulation": ("atomic", 11, "early in a step", killed),
    "interrupted together with its workers": ("workers", 7, "early in a step", interrupted),
}
"""Name -> the scene, after how many steps, where and how it is cut."""


def file_of(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_")


def run(name: str, folder: Path) -> int:
    scene, steps, place, what = SIGNALS[name]
    program, path = SCENES[scene].program(), file_of(folder, name)
    cut = Cut(program)
    cut.set(steps, place, what)
    loader = cut.watched(SCENES[scene].loader(7), "in the loader")
    seed_everything(7)
    if what is killed:
        SCENES[scene].fit(program, loader, checkpoint=path, every=2)
        return 1  # it should not live to see this
    history = SCENES[scene].fit(program, loader)
    program.save(path)
    return 0 if history.interrupted and program.steps == steps + 1 else 1


def main(folder: Path) -> None:
    importlib.import_module("torch._dynamo")  # compiling imports it: once, not in each process
    children = {}
    for name in SIGNALS:
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
            code = 1
            try:
                code = run(name, folder)
            finally:
                os._exit(code)
        children[name] = child
    for name, child in children.items():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != (-signal.SIGKILL if SIGNALS[name][3] is killed else 0):
            sys.exit(f"'{name}' ended with {code}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
