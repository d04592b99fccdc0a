"""A compiled model: its plans, and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from locc import files
from locc.errors import CaptureError, LoccError, MethodError, RunError, nearest
from locc.ir import Inputs, Phase, Root
from locc.ir.state import begin_all, states
from locc.ir.view import node_modules
from locc.lower import ModuleProgram, Plan, gathered, lower, module_programs
from locc.runtime import waves
from locc.runtime.backends import BACKENDS
from locc.runtime.built import Built
from locc.runtime.compiled import BackendReport
from locc.runtime.features import Features
from locc.runtime.grouped import Groups
from locc.runtime.member import Member
from locc.runtime.offload import OnDisk
from locc.runtime.placed import Placed, moved_to
from locc.runtime.progress import Progress
from locc.runtime.ranks import Cost, measured
from locc.runtime.ranks.forecast import Forecast, forecast
from locc.runtime.records import size_of
from locc.runtime.replay import Workers
from locc.runtime.report import StepReport
from locc.runtime.settings import Settings
from locc.runtime.stacked import Diagonal
from locc.runtime.stops import empty

FEW = 4
"""Samples of the first batch on which a program without example inputs is compiled."""

observers: list[Callable[[Compiled], None]] = []
"""Called with each program whose compilation is complete; the pytest plugin adds its own."""


class Compiled(Placed):
    """A model with one training program per module: what `locc.Program` adds its other verbs to.

    Calling it runs the inference path; `train()`, `eval()` and `to()` work as for any module. The
    model's own parameters are trained in place.
    """

    def __init__(
        self, root: Root, method: str, settings: Settings, build: Callable[[Compiled, Inputs], Built]
    ) -> None:
        super().__init__(root, method, settings)
        self.steps = 0
        self.epochs = 0
        self.phase: str | None = None
        self.progress: Progress | None = None
        self.features: Features | None = None
        self.warm: set[str] = set()
        self._build = build
        self._home = id(root)

    # ---- compilation ------------------------------------------------------------------------

    def complete(self, x: Any, samples: int | None = None) -> None:
        """Finish the compilation with example inputs, if that has not happened yet.

        Compiling runs the whole model end to end, which may be what does not fit in memory: `samples`
        takes that many from the batch, and all of it only for a model that cannot be captured so.
        """
        if self._built is None:
            inputs = Inputs.of(self.model, x)
            few = inputs if samples is None else inputs.head(samples)
            try:
                self._built = self._build(self, few)
            except CaptureError:
                if few is inputs:
                    raise
                self._built = self._build(self, inputs)
            if self.settings.schedule in ("pipelined", "replay"):
                self.member = Member.joined(self)
            if self.settings.schedule == "sequential":
                self.phase = self._built.phases[0].name
            for notify in observers:
                notify(self)

    @property
    def module_programs(self) -> dict[str, ModuleProgram]:
        """Each module's own program in the current phase: what it receives, runs and sends."""
        return module_programs(self.ir, self.plan(self.phase))

    @property
    def backend_report(self) -> BackendReport:
        """What of the code that has run is compiled, by module, and why the rest is not."""
        joined = [piece for diagonal in self.built.diagonals.values() for piece in diagonal.pieces]
        executor = self.built.executor
        recorded = () if executor.graphs is None else executor.graphs.pieces
        pieces = (*executor.codes.pieces.values(), *joined, *recorded)
        grouped = self.built.groups.values()
        groups = tuple(group for one in grouped for group in one.groups)
        return BackendReport(
            self.settings.backend, pieces, groups, {k: why for one in grouped for k, why in one.alone.items()}
        )

    # ---- training ---------------------------------------------------------------------------

    def step(self, x: Any, y: Any = None) -> StepReport:
        """Train on one batch.

        Args:
            x: a tensor, a tuple of arguments, or a dict of keyword arguments of the model.
            y: the target, as the loss takes it.

        Raises:
            RunError: an objective is not finite, PyTorch refuses the batch, the inputs have another shape
                than compiled for, or another step is under way.
        """
        return self._in_turn([(x, y)], None)[0]

    def wave(
        self, batches: Sequence[tuple[Any, Any]], updated: waves.Updated = lambda *_: None
    ) -> list[StepReport]:
        """Train on several batches, each module on all of them before the next one starts.

        Ends with the bits of as many calls of `step`. With `atomic=True` a wave that fails is undone whole.

        Args:
            batches: (x, y) as `step` takes them, all of one shape.
            updated: called after each module's step with the number of the batch, the module with its
                auxiliaries, and their objectives by name. With `backend="vmap"`, the parameters of modules
                that run as one are then as they were before the wave.

        Raises:
            MethodError: the program is not pipeline-exact.
            RunError: see `step`, where modules before the one that it names have trained on all batches; or
                there are no batches, or batches of several shapes, and nothing has changed.
        """
        waves.check_alike(batches)
        return self._in_turn(batches, updated)

    def _in_turn(self, batches: Sequence[tuple[Any, Any]], updated: waves.Updated | None) -> list[StepReport]:
        # Waiting would hang a callback that calls step, and leave the order of the batches to chance.
        if not self._turn.acquire(blocking=False):
            raise RunError(
                "a step of this program is under way, in another thread or around this call, and a second "
                "one would mix with it; call step from one thread, after the step before has returned"
            )
        try:
            return self._steps(batches, updated)
        finally:
            self._rest()
            self._turn.release()

    def _rest(self) -> None:
        """Have all tensors where what is outside of a step looks for them."""
        offload = None if self._built is None else self._built.executor.offload
        if offload is not None:
            offload.rest()

    def _steps(self, batches: Sequence[tuple[Any, Any]], updated: waves.Updated | None) -> list[StepReport]:
        self.complete(batches[0][0], FEW)
        built = self.built
        if not (self.training and self.model.training):
            raise RunError("the program is in eval mode; call program.train() before a step")
        if torch.is_inference_mode_enabled():
            raise RunError("a step inside torch.inference_mode() cannot train; leave it first")
        if self._home != id(self.root):
            raise RunError(
                "this is a copy of a program, and its code is bound to the model of the original; copy "
                "program.model and compile again"
            )
        plan = self.plan(self.phase)
        grouped = None if self.settings.group is None else self._groups(self.phase)
        if grouped is None:
            unknown = any(map(built.executor.unknown, self._runs(plan, updated)))
        else:
            unknown = grouped.unknown(batches)
        tried = self.settings.strict and unknown
        backup = self._backup() if self.settings.atomic or tried else None
        try:
            if self.member is not None and self.settings.replay is not None:
                return [self.member.paced(batches[0], updated or (lambda *_: None))]
            values = [self.bind(x, y) for x, y in batches]
            with self.in_phase():
                if self.member is not None:
                    return [self.member.step(plan, values[0])]
                if self.settings.replay is not None:
                    workers = self.workers(self.phase)
                    found = [workers.run(built.executor, values[0], updated or (lambda *_: None))]
                elif updated is None:
                    found = [self._run(plan, values[0])]
                elif self.settings.backend == "vmap":
                    found = self._diagonal(self.phase).run(values, self.steps, updated)
                else:
                    found = waves.run(built.executor, self._parts(self.phase), values, self.steps, updated)
        except BaseException:
            if backup is not None:
                self._rest()
                backup()
            raise
        self.steps += len(found)
        return [StepReport(objectives, loss) for objectives, loss in found]

    def _runs(self, plan: Plan, updated: waves.Updated | None) -> list[Plan]:
        """Return the plans that a step runs, or a wave."""
        in_wave = self.settings.wave is not None and updated is not None
        return [part.plan for part in self._parts(self.phase)] if in_wave else [plan]

    def replay(self, x: Any, y: Any = None, updated: waves.Updated = lambda *_: None) -> StepReport:
        """Do as `step` under the schedule "replay", and say which modules train.

        Args:
            x: as `step` takes it.
            y: as `step` takes it.
            updated: called after each module's step with 0, the module with its auxiliaries, and their
                objectives by name.
        """
        return self._in_turn([(x, y)], updated)[0]

    def workers(self, phase: str | None) -> Workers:
        """Return who trains in a phase under the schedule "replay", each with what it has kept."""
        if phase not in self.built.workers:
            assert self.settings.replay is not None
            parts = self._parts(phase)
            held = next((s for s in self.built.states if s.spec.batch_dim is not None), None)
            if held is not None and self.settings.replay.buffer:
                raise MethodError(
                    f"state '{held.name}' of '{held.owner}' has a row for each sample of the batch before, "
                    "and with schedule='replay' there is no such batch; use schedule='lockstep'"
                )
            self.built.workers[phase] = workers = Workers.of(self.settings.replay, parts, self.steps)
            if self.member is not None:
                self.member.employ(workers, parts, phase)
        return self.built.workers[phase]

    def _run(self, plan: Plan, values: list[Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        if self.features is not None and self.features.plan is plan:
            return self.features.run(self.built.executor, values, self.steps)
        if self.settings.group is not None:
            return self._groups(self.phase).run(values, self.steps)
        return self.built.executor.run(plan, values, self.steps)

    def costs(self, plan: Plan, values: list[Any]) -> dict[str, Cost]:
        """Return what each module takes of a step, which is undone."""
        programs = waves.ordered(module_programs(self.ir, plan))
        with files.keeping(self.settings.files or files.DISK):  # of what is in a file, that is
            undo = self._backup()
        executor = self.built.executor
        if executor.offload is None and any(map(files.lies, self.root.parameters())):
            offload = OnDisk(files.DISK, self.ir, self.built.learners)
            executor = replace(executor, offload=offload)
        try:
            return measured(executor, plan, programs, values, self.steps)
        finally:
            self._rest()
            undo()

    def forecast(
        self,
        x: Any,
        y: Any = None,
        *,
        ranks: int,
        batches: int,
        bandwidth: float | None = None,
        latency: float = 0.0,
    ) -> Forecast:
        """Say what a pass over the data would take in a pipeline, from what the modules take here.

        The modules are timed on a batch in this process; that is undone. Each rank counts as a machine of its
        own that is as fast as this one.

        Args:
            x: of a batch, as `step` takes it.
            y: its target.
            ranks: how many processes.
            batches: of the pass.
            bandwidth: bytes a second between two ranks; None: what travels costs no time.
            latency: seconds until a value arrives, beside its bytes.

        Raises:
            MethodError: the program is not pipeline-exact.
            LoccError: there are fewer modules than ranks, or a number makes no sense.
            RunError: see `step`.
        """
        self.complete(x, FEW)
        self.whole()
        waves.check(self.ir, self.method, self.built.certificate, "pipelined")
        with self.in_phase():
            costs = self.costs(self.plan(self.phase), self.bind(x, y))
        return forecast(costs, ranks, batches, bandwidth, latency)

    def gather(self) -> None:
        """Bring what the other ranks have trained into this process; every rank calls it.

        Under the schedule "pipelined" a rank holds its own modules alone while it trains; after this, all of
        them until the next step. `fit` ends with it (see its `gather`). Elsewhere there is nothing to do.

        Raises:
            RunError: a rank is gone.
        """
        if self.member is not None:
            self.member.gather()

    def count(self) -> None:
        """Bring the sums of the other ranks' objectives in the pass under way; every rank calls it."""
        if self.member is not None:
            self.member.count()

    def _diagonal(self, phase: str | None) -> Diagonal:
        diagonals = self.built.diagonals
        if phase not in diagonals:
            diagonals[phase] = Diagonal(self.ir, self.built.executor, self._parts(phase))
        return diagonals[phase]

    def _groups(self, phase: str | None) -> Groups:
        groups, settings = self.built.groups, self.settings
        if phase not in groups:
            assert settings.group is not None
            budget = size_of(settings.group, "group")
            groups[phase] = Groups(self.ir, self.built.executor, self._parts(phase), budget, settings.strict)
        return groups[phase]

    def _parts(self, phase: str | None) -> list[ModuleProgram]:
        if phase not in self.built.parts:
            schedule = "wave" if self.settings.replay is None else "replay"
            schedule = "lockstep" if self.settings.group is not None else schedule
            waves.check(self.ir, self.method, self.built.certificate, schedule)
            parts = waves.ordered(module_programs(self.ir, self.plan(phase)))
            if BACKENDS[self.settings.backend].gathers:
                parts = [replace(part, plan=gathered(part.plan)) for part in parts]
            self.built.parts[phase] = parts
        return self.built.parts[phase]

    def bind(self, x: Any, y: Any = None) -> list[Any]:
        """Return the values of a plan's inputs for a batch as `step` takes it, on the model's device.

        In a phase without data there may be no inputs: `x` is None.

        Raises:
            RunError: the inputs have another shape than compiled for or no samples, or the target is none
                that the method or the loss can read; nothing has changed.
        """
        device = self._follow_device()
        signature = self.ir.captured.signature
        if x is None and self._current is not None and self._current.steps is not None:
            tensors: list[Any] = [None for _ in self.ir.inputs]
            batch = len(y)
        else:
            tensors = signature.bind(Inputs.of(self.model, moved_to(x, device)))
            batch = signature.batch_of(tensors)
        if batch == 0:
            raise empty()
        problem = self.built.misfit(y, batch)
        if problem is not None:
            raise RunError(problem)
        begin_all(self.built.states, batch)
        return [*tensors, moved_to(y, device)]

    def plan(self, phase: str | None = None) -> Plan:
        """Return the instructions of a step in a phase; without one, of a step in which all train."""
        built = self.built
        if phase not in built.plans:
            apart = BACKENDS[self.settings.backend].apart
            if phase is None:
                built.plans[None] = lower(built.ir, apart=apart)
            else:
                found = {p.name: p for p in built.phases}
                if phase not in found:
                    raise RunError(f"there is no phase '{phase}'; {nearest(phase, found)}")
                built.plans[phase] = lower(built.ir, frozenset(found[phase].trains), apart=apart)
        return built.plans[phase]

    @contextmanager
    def in_phase(self) -> Iterator[None]:
        """Put the modules that the program's phase freezes into eval mode for a step, and set its rate."""
        changed = [m for m in self._resting() if m.training]
        rate = None if self._current is None else self._current.lr
        groups = [] if rate is None else [g for o in self.optimizers.values() for g in o.param_groups]
        rates = [group["lr"] for group in groups]
        for module in changed:
            module.training = False
        for group in groups:
            group["lr"] = rate
        try:
            yield
        finally:
            for module in changed:
                module.training = True
            for group, own in zip(groups, rates, strict=True):
                group["lr"] = own

    def _resting(self) -> list[nn.Module]:
        """Return everything that the code of the owners calls that the program's phase freezes."""
        phase, built = self._current, self.built
        if phase is None:
            return []
        if phase.name not in built.resting:
            owners = phase.freezes(built.ir.owners)
            nodes = [n for n in built.ir.graph.nodes if n.meta.get("owner") in owners]
            found = dict.fromkeys(m for n in nodes for m in node_modules(self.root, n))
            built.resting[phase.name] = list(found)
        return built.resting[phase.name]

    @property
    def _current(self) -> Phase | None:
        return next((p for p in self.built.phases if p.name == self.phase), None)

    def _backup(self) -> Callable[[], None]:
        """Return a function that undoes everything a step changes."""
        self._follow_device()
        every = (*self.root.parameters(), *self.root.buffers())
        here = [t for t in every if self.ranks is None or t not in self.ranks.away]
        tensors = [(t, files.copy(t)) for t in here]
        held = [(state, state.value) for _, state in states(self.root)]  # another batch size replaces it
        learners = [learner.backup() for learner in self.built.learners.values()]

        def restore() -> None:
            with torch.no_grad():
                for tensor, value in tensors:
                    tensor.copy_(value)
            for state, value in held:
                state.value = value
            for undo in learners:
                undo()

        return restore


def checked(program: object) -> Compiled:
    """Return a program, where one was asked for.

    Raises:
        LoccError: it is something else.
    """
    if not isinstance(program, Compiled):
        raise LoccError(
            f"a compiled program was asked for, as locc.compile returns it; found {type(program).__name__}"
        )
    return program
