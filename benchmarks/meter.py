"""Meters that know nothing of locc: peak memory and arithmetic of a function, step times side by side.

Memory on the CPU is counted, not sampled. A dispatch mode sees every tensor that an operator returns, in
the forward pass and in autograd's backward pass alike, and counts its storage once, from its first
appearance until the storage itself dies. So views cost nothing, and a tensor that autograd saved counts
for as long as autograd holds it. What an operator allocates and frees inside itself (a matrix product's
workspace) is not seen, and code that does not pass the dispatcher (compiled kernels) is not either.
What an optimizer allocates during its `step` is counted apart: it is neither activation nor gradient.
`allocated` counts what the allocator hands out instead, to compiled kernels as well, whatever for.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_ATTENTION = {  # on the CPU, which PyTorch's own table lacks
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(
        *shapes[:3]
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default}
"""Operators whose *input* is new: `torch.tensor(...)` makes its storage outside the dispatcher."""


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory was live, in bytes above what lived before the function ran."""

    total: int
    """Activations, saved tensors and gradients."""
    gradients: int
    """Of the total: storages that were, or became, the `.grad` of one of the given parameters."""
    with_optimizer: int
    """The highest level when an optimizer's temporaries (two of a parameter's size, in Adam) count too."""

    @property
    def activations(self) -> int:
        """The rest: activations, saved tensors, gradients on their way."""
        return self.total - self.gradients

    def __str__(self) -> str:
        mib = 2.0**20
        return (
            f"{self.total / mib:.2f} MiB ({self.gradients / mib:.2f} of it gradients; "
            f"{self.with_optimizer / mib:.2f} with the optimizer's temporaries)"
        )


class _Record:
    """One live storage: its size, and what it is for."""

    __slots__ = ("gradient", "nbytes", "optimizer")

    def __init__(self, nbytes: int, *, optimizer: bool) -> None:
        self.nbytes = nbytes
        self.optimizer = optimizer
        self.gradient = False


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of the CPU storages that come to life while it is active.

    Storages that an operator *reads* before any operator returned them (parameters, the batch, optimizer
    state) are the baseline: they count nothing, and their release subtracts nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_optimizer = False
        self._live = self._live_optimizer = 0
        self._peak = self._peak_with_optimizer = 0
        self._records: dict[int, _Record] = {}
        self._baseline: set[int] = set()
        self._finalizers: dict[int, weakref.finalize[..., Any]] = {}
        self._at_peak: list[_Record] = []

    def peak(self) -> Peak:
        """Return the highest levels so far."""
        gradients = sum(record.nbytes for record in self._at_peak if record.gradient)
        return Peak(self._peak, gradients, self._peak_with_optimizer)

    def mark_gradient(self, parameter: Tensor) -> None:
        """Note that the storage of `parameter.grad` holds a gradient."""
        if parameter.grad is not None:
            record = self._records.get(parameter.grad.untyped_storage()._cdata)
            if record is not None:
                record.gradient = True

    def forget(self) -> None:
        """Detach the finalisers, so that the meter can go before the storages do."""
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and account for what it returned."""
        kwargs = kwargs or {}
        if func not in _LIFTS:
            for storage in _storages((args, kwargs)):
                self._see(storage, new=False)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._see(storage, new=True)
        if self._live > self._peak:
            self._peak = self._live
            self._at_peak = [record for record in self._records.values() if not record.optimizer]
        self._peak_with_optimizer = max(self._peak_with_optimizer, self._live + self._live_optimizer)
        return result

    def _see(self, storage: torch.UntypedStorage, *, new: bool) -> None:
        key = storage._cdata
        record = self._records.get(key)
        if record is not None:  # a known one; `resize_` may have changed its size
            self._add(storage.nbytes() - record.nbytes, optimizer=record.optimizer)
            record.nbytes = storage.nbytes()
        elif key not in self._baseline:
            if new:
                self._records[key] = _Record(storage.nbytes(), optimizer=self.in_optimizer)
                self._add(storage.nbytes(), optimizer=self.in_optimizer)
            else:
                self._baseline.add(key)
            self._finalizers[key] = weakref.finalize(storage, self._release, key)

    def _add(self, nbytes: int, *, optimizer: bool) -> None:
        if optimizer:
            self._live_optimizer += nbytes
        else:
            self._live += nbytes

    def _release(self, key: int) -> None:
        self._finalizers.pop(key, None)
        self._baseline.discard(key)
        record = self._records.pop(key, None)
        if record is not None:
            self._add(-record.nbytes, optimizer=record.optimizer)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided:
            yield leaf.untyped_storage()


@contextmanager
def _optimizer_hooks(meter: StorageMeter) -> Iterator[None]:
    def enter(*_: object) -> None:
        meter.in_optimizer = True

    def leave(*_: object) -> None:
        meter.in_optimizer = False

    hooks = [register_optimizer_step_pre_hook(enter), register_optimizer_step_post_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _gradient_hooks(meter: StorageMeter, parameters: Iterable[Tensor]) -> Iterator[None]:
    leaves = [p for p in parameters if p.requires_grad and p.is_leaf]
    hooks = [p.register_post_accumulate_grad_hook(meter.mark_gradient) for p in leaves]
    try:
        yield
        for leaf in leaves:  # a gradient that was assigned rather than accumulated
            meter.mark_gradient(leaf)
    finally:
        for hook in hooks:
            hook.remove()


def peak(fn: Callable[[], object], parameters: Iterable[Tensor] = ()) -> Peak:
    """Run `fn` once and return its peak memory on the CPU, with the share of `parameters`' gradients.

    Call it on a second step: an optimizer allocates its state in the first. Gradients that exist before
    `fn` runs belong to the baseline, so set them to None first.
    """
    meter = StorageMeter()
    try:
        with _gradient_hooks(meter, parameters), _optimizer_hooks(meter), meter:
            fn()
        return meter.peak()
    finally:
        meter.forget()


def peak_memory(fn: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Run `fn` once and return the most bytes of tensors alive at a time, above those alive before.

    On the CPU these are activations and gradients (`Peak.total`); on CUDA, what the allocator handed out.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return peak(fn).total


def allocated(fn: Callable[[], object]) -> int:
    """Run `fn` once; return the most bytes that the CPU's allocator handed out above those before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as found:
        fn()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def flops(fn: Callable[[], object]) -> int:
    """Run `fn` once; return its floating-point operations in matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        fn()
    return int(counter.get_total_flops())


def gradients_of(*modules: nn.Module) -> list[Tensor]:
    """Return the parameters of `modules`, for `peak(fn, parameters=...)`."""
    return [p for module in modules for p in module.parameters()]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median, and the fastest and slowest call."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Timing:
        """Summarise `values`."""
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.low:.2f} to {self.high:.2f})"


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    warmup: int = 3,
    until: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the contestants in turn, A B C A B C ..., and return each one's milliseconds, round by round.

    From three rounds on, the one in which `time.perf_counter()` passes `until` is the last.

    What disturbs the machine for a while then disturbs all of them alike, so the ratio of two contestants
    within a round is steadier than either time.
    """
    for _ in range(warmup):
        for fn in contestants.values():
            fn()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for done in range(rounds):
        for name, fn in contestants.items():
            _settle()
            started = clock()
            fn()
            _settle()
            times[name].append((clock() - started) * 1e3)
        if time.perf_counter() > until and done > 1:
            break
    return times


def ratio(times: Mapping[str, list[float]], numerator: str, denominator: str) -> Timing:
    """Return the round-by-round ratio of two contestants, as median and extremes."""
    return Timing.of(a / b for a, b in zip(times[numerator], times[denominator], strict=True))


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
