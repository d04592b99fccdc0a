"""Runs the instructions of a plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from locc.errors import RunError
from locc.lower import Backward, Instruction, Loop, Plan, Segment, Update


@dataclass
class Learner:
    """The optimizer of one owner, with what it needs for an update."""

    owner: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip: float | None = None
    pending: int = 0
    skip: Tensor | None = None

    @property
    def gated(self) -> bool:
        """Whether the optimizer itself can skip an update on the device, without a synchronisation."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def update(self, accumulate: int) -> None:
        """Count a backward pass; on the last of `accumulate`, step on the mean gradient and clear it."""
        self.pending += 1
        if self.pending < accumulate:
            return
        if self.pending > 1:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_div_(gradients, float(self.pending))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.clear()

    def backup(self) -> Callable[[], None]:
        """Return a function that puts back optimizer state and accumulated gradients as they are now."""
        state = {p: {k: _copied(v) for k, v in held.items()} for p, held in self.optimizer.state.items()}
        gradients = (
            [_copied(p.grad) for p in self.parameters] if self.pending else [None] * len(self.parameters)
        )
        pending, skip = self.pending, self.skip

        def restore() -> None:
            self.optimizer.state.clear()
            self.optimizer.state.update(state)
            self.pending, self.skip = pending, skip
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

        return restore

    def clear(self) -> None:
        """Drop the gradients, so that their memory is free."""
        self.pending, self.skip = 0, None
        for parameter in self.parameters:
            parameter.grad = None


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@dataclass
class Executor:
    """Runs steps of a plan; holds what persists between them.

    `observe` is called after each instruction, with the values in flight. With `guarded=False` an
    objective that is not finite does not stop the step.
    """

    learners: dict[str, Learner]
    seed: int
    owners: dict[str, int]
    accumulate: int = 1
    autocast: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    observe: Callable[[Instruction, dict[str, Any]], None] | None = None
    deferred: bool = True
    guarded: bool = True
    flags: list[tuple[int, str, Tensor, torch.cuda.Event]] = field(default_factory=list)

    def run(self, plan: Plan, values: Iterable[Any], step: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Run one step.

        Returns:
            The objectives by name and the loss, 0-d tensors that are not synchronised.

        Raises:
            RunError: an objective is not finite; no parameter of its owner has changed.
        """
        self.raise_deferred(step)
        state = _Step(self, plan, dict(zip(plan.inputs, values, strict=True)), step)
        try:
            with preserved_rng(self.device):
                state.run(plan.instructions)
        except BaseException:
            for learner in self.learners.values():
                learner.clear()
            raise
        return state.objectives, state.loss

    def defer(self, step: int, name: str, flag: Tensor) -> None:
        """Note a flag on the device, to be read when it has arrived without waiting for it."""
        arriving = torch.empty((), pin_memory=True).copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.flags.append((step, name, arriving, event))

    def raise_deferred(self, step: int | None = None) -> None:
        """Raise for a non-finite objective that an earlier step met on the device.

        Waits for the device only for flags older than two steps; without `step`, for all.
        """
        flags, self.flags = self.flags, []
        for i, (made, name, flag, event) in enumerate(flags):
            if step is not None and made > step - 2 and not event.query():
                self.flags = flags[i:]
                return
            event.synchronize()
            if bool(flag):
                raise _non_finite(name, float("nan"))


def _non_finite(name: str, value: float) -> RunError:
    owner, _, objective = name.rpartition(".")
    return RunError(
        f"objective '{objective}' of module '{owner}' is {value}; the step stopped before the module's "
        "parameters changed. Lower the learning rate, clip gradients (clip=1.0), or look at this batch"
    )


class _Step:
    """The values of one step in flight."""

    def __init__(self, executor: Executor, plan: Plan, values: dict[str, Any], step: int) -> None:
        self.executor, self.plan, self.values, self.step = executor, plan, values, step
        self.objectives: dict[str, Tensor] = {}
        self.loss: Tensor | None = None
        self.round = 0

    def run(self, instructions: list[Instruction]) -> None:
        values = self.values
        observe = self.executor.observe
        for instruction in instructions:
            if isinstance(instruction, Segment):
                self._segment(instruction)
            elif isinstance(instruction, Backward):
                self._backward(instruction)
            elif isinstance(instruction, Update):
                self._seed(instruction.owner, "update")  # others may have drawn since its backward pass
                self.executor.learners[instruction.owner].update(self.executor.accumulate)
            else:
                self._loop(instruction)
            if observe is not None:
                observe(instruction, values)
            for name in instruction.frees:
                del values[name]

    def _seed(self, owner: str, stretch: int | str) -> None:
        executor = self.executor
        seed_all(stream(executor.seed, executor.owners[owner], self.step, stretch, self.round))

    def _segment(self, segment: Segment) -> None:
        executor, values = self.executor, self.values
        self._seed(segment.owner, segment.number)
        if executor.autocast is None and torch.is_autocast_enabled(executor.device.type):
            # The user's own autocast keeps cast weights, made without a tape or before an update.
            torch.clear_autocast_cache()
        with torch.set_grad_enabled(segment.taped), autocast(executor.device, executor.autocast):
            results = segment.function(*[values[name] for name in segment.reads])
        for name, result in zip(segment.writes, results, strict=True):
            values[name] = result
        if self.plan.loss in segment.writes:
            self.loss = values[self.plan.loss].detach()

    def _backward(self, task: Backward) -> None:
        scalar: Tensor = self.values[task.scalar]
        leaves = [self.values[leaf] for _, leaf in task.gradients]
        if task.objectives:
            self._record(task, scalar)
            if scalar.requires_grad:
                scalar.backward(retain_graph=task.retain)
            found = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
        elif scalar.requires_grad:
            found = list(torch.autograd.grad(scalar, leaves, retain_graph=task.retain, allow_unused=True))
        else:
            found = [None] * len(leaves)
        for (name, _), leaf, gradient in zip(task.gradients, leaves, found, strict=True):
            self.values[name] = torch.zeros_like(leaf) if gradient is None else gradient

    def _record(self, task: Backward, scalar: Tensor) -> None:
        value = scalar.detach()
        for name in task.objectives:
            self.objectives[name] = value
        if not self.executor.guarded:
            return
        learner = self.executor.learners.get(task.owner)
        if value.device.type == "cpu":
            if not math.isfinite(value):
                raise _non_finite(task.objectives[0], float(value))
        elif learner is not None and learner.gated and self.executor.deferred:
            # The optimizer skips its update on the device; the error is raised when the flag is read.
            flag = (~torch.isfinite(value)).float()
            learner.skip = flag if learner.skip is None else torch.maximum(learner.skip, flag)
            learner.optimizer.found_inf = learner.skip  # type: ignore[attr-defined]
            learner.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.executor.defer(self.step, task.objectives[0], flag)
        elif not math.isfinite(value):
            raise _non_finite(task.objectives[0], float(value))

    def _loop(self, loop: Loop) -> None:
        values = self.values
        for i in range(loop.times):
            self.round = i
            for initial, entry, end in loop.carried:
                values[entry] = values[initial] if i == 0 else values[end]
            self.run(loop.body)
        self.round = 0
        for _, entry, _ in loop.carried:
            del values[entry]


def stream(seed: int, owner: int, step: int, stretch: int | str, repetition: int) -> int:
    """Return the seed of one stretch of one owner's program: the same under every schedule."""
    text = f"{seed}/{owner}/{step}/{stretch}/{repetition}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed the generators that modules draw from, without the bookkeeping of `torch.manual_seed`."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leave the user's own random state as it was."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return the autocast context of a segment; without a dtype the surrounding state stays."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
