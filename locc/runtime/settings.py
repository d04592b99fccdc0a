"""What the user asked for in `compile`, checked once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from locc.errors import LoccError, MethodError, nearest
from locc.files import DISK, check_place
from locc.ir import Owner, Phase, TrainingGraph
from locc.ir.captured import strip
from locc.lower import runs_frozen
from locc.optimizers import keep_norms
from locc.recipes import Recipe
from locc.runtime.backends import BACKENDS
from locc.runtime.learner import Learner
from locc.runtime.records import LIMIT, MEMORY, size_of
from locc.runtime.replay import Replay
from locc.runtime.visits import IN_HOST

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]

SCHEDULES = ("lockstep", "sequential", "wave", "pipelined", "replay")
_ASIDE = ("pipelined", "replay")
"""Those that run in several processes."""
UPDATES = ("after_backward", "in_backward")
WAVE = 8
"""Batches of a wave, unless given."""
TIMEOUT = 600.0
"""Seconds of silence between ranks, unless given."""
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """Training settings that do not change the graph."""

    optimizer: OptimizerFactory | Recipe = field(default_factory=Recipe)
    schedule: str = "lockstep"
    backend: str = "eager"
    clip: float | None = None
    accumulate: int = 1
    scheduler: SchedulerFactory | Mapping[str, SchedulerFactory] | None = None
    autocast: torch.dtype | str | None = None
    seed: int | None = None
    atomic: bool = False
    batches: int | None = None
    features: str | Path | None = None
    features_limit: int | str | None = None
    stages: tuple[tuple[str, ...], ...] | None = None
    timeout: float | None = None
    replicas: int | None = None
    offload: str | Path | None = None
    replay: Replay | None = None
    labels_within: bool = False
    """The labels are among the model's inputs: its own forward computes the loss."""
    update: str = "after_backward"
    recompute: bool | tuple[str, ...] = False
    strict: bool = False
    group: int | str | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise LoccError(
                f"schedule={self.schedule!r} is not available; {nearest(str(self.schedule), SCHEDULES)}"
            )
        if self.batches is not None and (type(self.batches) is not int or self.batches < 1):
            raise LoccError(f"batches={self.batches!r}: give the number of batches of a wave, at least 1")
        if self.batches is not None and self.schedule != "wave":
            raise LoccError(
                f"batches={self.batches} is how many batches go through a module in schedule='wave', and "
                f"schedule={self.schedule!r} was asked for; leave it out"
            )
        self._check_replay()
        self._check_ranks()
        if self.backend not in BACKENDS:
            raise LoccError(
                f"backend={self.backend!r} is not available; {nearest(str(self.backend), BACKENDS)}"
            )
        self._check_vmap()
        self._check_graphs()
        self._check_group()
        if self.strict and self.backend in ("eager", "vmap"):
            raise LoccError(
                "strict=True refuses code that a backend cannot compile, and "
                f"backend={self.backend!r} compiles none; use backend='inductor', or leave it out"
            )
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise LoccError(
                f"accumulate={self.accumulate!r}: give the number of steps per update, at least 1"
            )
        if self.clip is not None and not (_is_number(self.clip) and self.clip > 0):
            raise LoccError(f"clip={self.clip!r}: give the largest gradient norm of a module, above 0")
        self._check_update()
        self._check_recompute()
        if self.seed is not None and type(self.seed) is not int:
            raise LoccError(f"seed={self.seed!r}: give a whole number, or None for torch.initial_seed()")
        self._check_features()
        self._check_offload()
        self._check_autocast()
        if not isinstance(self.optimizer, Recipe) and not callable(self.optimizer):
            raise LoccError(
                "optimizer must be a callable that builds one from parameters, such as "
                "lambda params: torch.optim.SGD(params, lr=0.1), or a locc.Recipe; found "
                + type(self.optimizer).__name__
            )
        factories = self.scheduler.values() if isinstance(self.scheduler, Mapping) else [self.scheduler]
        for factory in factories:
            if factory is not None and not callable(factory):
                raise LoccError(
                    "scheduler must be a callable that builds one from an optimizer, or a dict of them by"
                    f" module; found {type(factory).__name__}"
                )

    def _check_vmap(self) -> None:
        if self.backend != "vmap":
            return
        if self.schedule != "wave":
            raise LoccError(
                "backend='vmap' runs modules of one structure as one, each on another batch, and "
                f"schedule={self.schedule!r} trains on one batch at a time; add schedule='wave', batches=T"
            )
        unlike = {"autocast": self.autocast, "offload": self.offload}
        given = [name for name, value in unlike.items() if value is not None]
        given += ["update"] if self.update != "after_backward" else []
        if given:
            raise LoccError(f"backend='vmap' does not work with {given[0]}=; leave one of them out")

    def _check_graphs(self) -> None:
        if self.backend != "cudagraphs":
            return
        if self.schedule in ("pipelined", "replay"):
            raise LoccError(
                f"backend='cudagraphs' is for a step in one process, and schedule={self.schedule!r} hands on "
                "values that outlive it; use schedule='lockstep', 'sequential' or 'wave'"
            )
        unlike = {
            "offload": self.offload is not None,
            "features": self.features is not None,
            "atomic": self.atomic,
            "accumulate": self.accumulate != 1,
        }
        given = [name for name, value in unlike.items() if value]
        if given:
            raise LoccError(f"backend='cudagraphs' does not work with {given[0]}=; leave one of them out")

    def _check_group(self) -> None:
        if self.group is None:
            return
        size_of(self.group, "group")
        if self.backend not in ("inductor", "aot_eager"):
            raise LoccError(
                f"group={self.group!r} compiles neighbours together, and backend={self.backend!r} compiles "
                "no code; use backend='inductor', or leave it out"
            )
        if self.schedule != "lockstep":
            raise LoccError(
                f"group={self.group!r} runs neighbours on one batch, one after the other, and "
                f"schedule={self.schedule!r} does not; use schedule='lockstep', or leave it out"
            )
        unlike = {
            "autocast": self.autocast is not None,
            "offload": self.offload is not None,
            "update": self.update != "after_backward",
        }
        given = [name for name, value in unlike.items() if value]
        if given:
            raise LoccError(f"group={self.group!r} does not work with {given[0]}=; leave one of them out")

    def _check_features(self) -> None:
        if self.features is None and self.features_limit is not None:
            raise LoccError(
                f"features_limit={self.features_limit!r} is how much features= keeps, and that is not given; "
                "give features='memory' or 'disk' as well, or leave it out"
            )
        if self.features is None:
            return
        check_place("features", self.features, (MEMORY, DISK))
        size_of(LIMIT if self.features_limit is None else self.features_limit)
        if self.schedule in ("wave", "pipelined", "replay"):
            raise LoccError(
                f"features={str(self.features)!r} keeps what rests from pass to pass, which "
                f"schedule={self.schedule!r} does not do; use schedule='sequential', or leave it out"
            )

    def _check_offload(self) -> None:
        if self.offload is None:
            return
        check_place("offload", self.offload, (DISK, IN_HOST))
        if self.atomic:
            raise LoccError(
                f"offload={str(self.offload)!r} is for training that does not fit in memory, and atomic=True "
                "keeps a copy of everything there during a step; leave one of them out"
            )

    def _check_replay(self) -> None:
        if self.replay is not None and self.schedule != "replay":
            raise LoccError(
                "buffer=, policy=, reuse= and slow= are of schedule='replay', and "
                f"schedule={self.schedule!r} was asked for; leave them out"
            )
        if self.atomic and self.schedule == "replay":
            raise LoccError(
                "atomic=True undoes a step that fails, and with schedule='replay' a step is of several "
                "batches; leave it out, and let fit write a checkpoint"
            )

    def _check_ranks(self) -> None:
        schedules = {"stages": _ASIDE, "timeout": _ASIDE, "replicas": _ASIDE[:1]}
        for name, of in schedules.items():
            if getattr(self, name) is not None and self.schedule not in of:
                raise LoccError(
                    f"{name}= is of schedule={' and '.join(map(repr, of))}, and "
                    f"schedule={self.schedule!r} was asked for; leave it out"
                )
        if self.replicas is not None and (type(self.replicas) is not int or self.replicas < 1):
            raise LoccError(f"replicas={self.replicas!r}: give how many ranks run each stage, at least 1")
        if self.timeout is not None and not (_is_number(self.timeout) and self.timeout > 0):
            raise LoccError(f"timeout={self.timeout!r}: give seconds of silence between ranks, above 0")
        if self.atomic and self.schedule == "pipelined":
            raise LoccError(
                "atomic=True undoes a step that fails, and with schedule='pipelined' the ranks are at "
                "different steps; leave it out, and let fit write a checkpoint"
            )

    def _check_update(self) -> None:
        if self.update not in UPDATES:
            raise LoccError(f"update={self.update!r} is not available; {nearest(str(self.update), UPDATES)}")
        if self.update == "in_backward" and self.clip is not None:
            raise LoccError(
                f"update='in_backward' drops a gradient as soon as it is known, and clip={self.clip} needs "
                "the norm of all of a module's; leave one of them out"
            )
        if self.update == "in_backward" and (self.replicas or 1) > 1:
            raise LoccError(
                "update='in_backward' drops a gradient as soon as it is known, and "
                f"replicas={self.replicas} take the mean of all of a module's; leave one of them out"
            )
        if self.update == "in_backward" and self.accumulate > 1:
            raise LoccError(
                "update='in_backward' drops a gradient as soon as it is known, and "
                f"accumulate={self.accumulate} keeps it for the next steps; leave one of them out"
            )

    def _check_recompute(self) -> None:
        named = self.recompute if isinstance(self.recompute, tuple) else ()
        if not isinstance(self.recompute, (bool, tuple)) or not all(isinstance(n, str) for n in named):
            raise LoccError(
                f"recompute={self.recompute!r}: give names or globs of submodules, or True for every one "
                "that the splits leave whole"
            )
        if self.recompute and self.backend != "eager":
            raise LoccError(
                f"recompute={self.recompute!r} is of backend='eager', and backend={self.backend!r} decides "
                "by itself what it computes again; leave one of them out"
            )

    def _check_autocast(self) -> None:
        known = (
            self.autocast in PRECISIONS
            if isinstance(self.autocast, str)
            else self.autocast in PRECISIONS.values()
        )
        if self.autocast is not None and not known:
            raise LoccError(
                f"autocast={self.autocast!r} is unknown; {nearest(str(self.autocast), PRECISIONS)}"
            )

    @property
    def files(self) -> str | Path | None:
        """Where the files are of what waits, if it does so on disk."""
        return None if self.visits else self.offload

    @property
    def visits(self) -> bool:
        """Whether modules visit a device that the model is not on."""
        return self.offload == IN_HOST

    @property
    def wave(self) -> int | None:
        """How many batches go through a module before the next one starts; None under other schedules."""
        return (self.batches or WAVE) if self.schedule == "wave" else None

    @property
    def dtype(self) -> torch.dtype | None:
        """The autocast dtype, or None."""
        return PRECISIONS[self.autocast] if isinstance(self.autocast, str) else self.autocast

    def check_resting(self, ir: TrainingGraph, phases: Iterable[Phase], name: str) -> None:
        """Refuse to keep features where nothing rests.

        Raises:
            MethodError: `features` is given, and in no phase does a module run that is frozen.
        """
        if self.features is not None and not any(runs_frozen(ir, phase) for phase in phases):
            raise MethodError(
                f"features={str(self.features)!r} keeps what modules at rest hand to the one that trains, "
                f"and with method '{name}', schedule={self.schedule!r} and {len(ir.modules)} module(s) none "
                "rests; use schedule='sequential' and two modules or more, or leave it out"
            )

    def learners(self, ir: TrainingGraph) -> dict[str, Learner]:
        """Build one optimizer for each owner that has an objective.

        Raises:
            MethodError: the factory fails, or returns an optimizer of other parameters.
        """
        found = {}
        paths = {id(p): strip(path) for path, p in ir.root.named_parameters()}
        embeddings = [m for m in ir.root.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        sparse = {id(m.weight) for m in embeddings if m.sparse}
        for name, owner in ir.owners.items():
            parameters = [p for p in ir.parameters(name).values() if p.requires_grad]
            if ir.objectives(name) and parameters:
                optimizer = self._optimizer(
                    owner, parameters, paths, any(id(p) in sparse for p in parameters)
                )
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * owner.lr_scale
                if owner.keeps_norms:
                    keep_norms(optimizer)
                found[name] = Learner(name, parameters, optimizer, self.clip)
        return found

    def check_used(self, ir: TrainingGraph, name: str) -> None:
        """Refuse settings of gradients for a method without any.

        Raises:
            MethodError: `accumulate`, `clip` or `scheduler` is given, and no owner has an objective.
        """
        given = {"accumulate": self.accumulate != 1, "clip": self.clip, "scheduler": self.scheduler}
        unused = [setting for setting, is_given in given.items() if is_given]
        if unused and not ir.objectives():
            raise MethodError(
                f"{unused[0]}= is given, and method '{name}' has no gradients and no optimizer: it sets "
                "every parameter by a formula of the batch; leave it out, or change the size of the batch"
            )

    def training(self, learners: Mapping[str, Learner]) -> str:
        """Say in one line by which optimizers a program trains, and where these come from."""
        if not learners:
            return "no optimizer: what trains is set by formulas"
        if isinstance(self.optimizer, Recipe):
            return str(self.optimizer)
        kinds = dict.fromkeys(type(learner.optimizer).__name__ for learner in learners.values())
        return f"{', '.join(kinds)} (the caller's own)"

    def _optimizer(
        self, of: Owner, parameters: list[nn.Parameter], paths: dict[int, str], sparse: bool
    ) -> torch.optim.Optimizer:
        if isinstance(self.optimizer, Recipe):
            return self.optimizer.of(of.name, of.auxiliary).build(parameters, not sparse)
        owner = of.name
        try:
            optimizer = self.optimizer(parameters)
        except Exception as error:
            raise MethodError(
                f"optimizer(params) failed for '{owner}': {type(error).__name__}: {error}; it is called once"
                " for each module, with the list of its parameters"
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise MethodError(
                f"optimizer(params) returned a {type(optimizer).__name__} for '{owner}', not an Optimizer"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        given = {id(p) for p in parameters}
        if held != given:
            change = ", ".join(
                f"{what} '{paths[key]}'" if key in paths else f"{what} a tensor that is no parameter"
                for what, keys in (("it also holds", held - given), ("it lacks", given - held))
                for key in sorted(keys, key=lambda k: paths.get(k, ""))[:3]
            )
            raise MethodError(
                f"optimizer(params) for '{owner}' does not hold exactly the parameters it was given "
                f"({change}); build it from its argument, not from model.parameters()"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise MethodError(
                f"optimizer {type(optimizer).__name__} evaluates the loss several times a step (a closure),"
                " which a program does not; choose one whose step() needs no closure"
            )
        return optimizer

    def schedulers(self, learners: Mapping[str, Learner]) -> dict[str, Any]:
        """Build the learning-rate schedulers, one for each optimizer that has one."""
        if self.scheduler is None:
            return {}
        if isinstance(self.scheduler, Mapping):
            for name in self.scheduler:
                if name not in learners:
                    raise LoccError(
                        f"scheduler for '{name}', which is no module that trains; {nearest(name, learners)}"
                    )
            return {name: _built(name, make, learners[name]) for name, make in self.scheduler.items()}
        return {name: _built(name, self.scheduler, learner) for name, learner in learners.items()}


def _built(owner: str, make: SchedulerFactory, learner: Learner) -> Any:
    try:
        made = make(learner.optimizer)
    except Exception as error:
        raise MethodError(
            f"scheduler(optimizer) failed for '{owner}': {type(error).__name__}: {error}"
        ) from error
    if getattr(made, "optimizer", learner.optimizer) is not learner.optimizer:
        raise MethodError(
            f"scheduler(optimizer) for '{owner}' schedules another optimizer than the one it was given; "
            "build it from its argument"
        )
    return made


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
