"""A model in the memory of the CPU whose modules visit a device, each for its turn.

Between two steps the model is one on the CPU like any other. In a step a tensor that comes to the device
keeps its identity and gets a storage there, which is empty while the tensor is away, and the same storage
when it comes again: what a tape has kept of it is then true again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from locc.errors import LoccError
from locc.ir import TrainingGraph
from locc.ir.captured import strip
from locc.ir.memory import memories, memory_of, memory_of_storage
from locc.runtime.learner import Learner
from locc.runtime.offload import Offload

IN_HOST = "cpu"
"""The value of `offload=` that asks for this."""


def device_for(model: torch.device) -> torch.device:
    """Return where the modules of a model that is on a device compute.

    Raises:
        LoccError: there is no CUDA device, or the model is on one of another kind.
    """
    if model.type == "cuda":
        return model
    if model.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    found = f"the model is on {model}" if model.type != "cpu" else "there is no CUDA device here"
    raise LoccError(
        f"offload='cpu' takes what waits for its turn on a GPU to the memory of the CPU, and {found}; "
        "offload='disk' takes what waits from the memory of the CPU to files"
    )


class Copies:
    """Copies between the memory of the CPU and a device, in the order in which they are asked for.

    This one does so at once; `Streamed` does so beside what a GPU computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def room(self, size: int) -> torch.UntypedStorage:
        """Return memory of the CPU from which and to which the device copies well."""
        return torch.UntypedStorage(size)

    def suits(self, storage: torch.UntypedStorage) -> bool:
        """Whether memory of the CPU is such."""
        return True

    def copy(self, to: torch.UntypedStorage, source: torch.UntypedStorage) -> None:
        """Copy when all is done that the device has been asked for so far."""
        _bytes(to).copy_(_bytes(source), non_blocking=True)

    def mark(self) -> Any:
        """Return what stands for the copies so far."""

    def await_(self, mark: Any) -> None:
        """Have the device wait for the copies that a mark stands for."""

    def finish(self) -> None:
        """Wait for all copies."""


class Streamed(Copies):
    """Copies on a stream of its own, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)

    def room(self, size: int) -> torch.UntypedStorage:
        """Return pinned memory."""
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).untyped_storage()

    def suits(self, storage: torch.UntypedStorage) -> bool:
        """Whether memory is pinned."""
        return bool(storage.is_pinned())

    def copy(self, to: torch.UntypedStorage, source: torch.UntypedStorage) -> None:
        """Copy when all is done that the device has been asked for so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            super().copy(to, source)
        # What is freed while it is copied must not be handed out before that is over.
        _bytes(to if to.device.type == "cuda" else source).record_stream(self.stream)

    def mark(self) -> torch.cuda.Event:
        """Return an event after the copies so far."""
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def await_(self, mark: torch.cuda.Event) -> None:
        """Have the device wait for the copies that a mark stands for."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        """Wait for all copies."""
        self.stream.synchronize()


@dataclass
class Berth:
    """A storage on the CPU, and its twin on the device, which is empty while nobody is there."""

    home: torch.UntypedStorage
    away: torch.UntypedStorage
    size: int
    visitors: list[Tensor] = field(default_factory=list)
    """Those that lie on the device now."""
    arrived: Any = None


class InHostMemory(Offload):
    """Has on a device the tensors of the owner whose turn it is, and of the one that will follow.

    Parameters, buffers, optimizer state and gradients that wait for more are elsewhere in the memory of the
    CPU, pinned. What values in flight lie in stays on the device.

    Args:
        ir: whose tensors go home now.
        learners: whose state goes home after each turn.
        device: where owners compute.

    Raises:
        LoccError: a tensor is not an ordinary one; nothing has moved then.
    """

    device: torch.device

    def __init__(self, ir: TrainingGraph, learners: Mapping[str, Learner], device: torch.device) -> None:
        super().__init__(ir, learners)
        self.device = device
        self._copies = Streamed(device) if device.type == "cuda" else Copies(device)
        self._berths: dict[int, Berth] = {}
        """By either of their storages, while a step runs."""
        named = [*ir.root.named_parameters(), *ir.root.named_buffers()]
        for path, tensor in named:
            if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
                raise LoccError(
                    f"offload='cpu' moves plain tensors, and '{strip(path)}' is a {type(tensor).__name__} of "
                    f"layout {tensor.layout}; leave it out"
                )
        self._send_home([tensor for _, tensor in named])

    def rest(self) -> None:
        """Bring everything home, and wait for it."""
        if self._at is not None:
            self._adopt(self._at)
        for berth in self._there():
            self._leave(berth)
        self._copies.finish()
        self._berths.clear()
        self._at = self._before = None

    def keep(self, owner: str) -> None:
        """Put what an owner's optimizer has, and its gradients that wait for more, into pinned memory."""
        self._send_home(self._made(owner))

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy, in the memory of the CPU."""
        return tensor.detach().clone()

    def _change(self, left: str | None, owner: str, following: str | None, values: Mapping[str, Any]) -> None:
        if left is not None:
            self._adopt(left)
        come = list(self._travelling(owner))
        soon = list(self._travelling(following)) if following is not None else []
        stay = {memory_of(t) for t in (*come, *soon)} | memories(dict(values))
        for berth in self._there():
            if memory_of_storage(berth.away) not in stay:
                self._leave(berth)
        self._fetch(come)
        for mark in {b.arrived for b in map(self._berth, come) if b is not None and b.arrived is not None}:
            self._copies.await_(mark)
        # The next one's come while this one computes, for that has not been asked for yet.
        self._fetch(soon)

    def _travelling(self, owner: str) -> Iterator[Tensor]:
        """Yield what an owner needs on the device: all but the counters that its optimizer has on the CPU."""
        stay = set()
        if (learner := self._learners.get(owner)) is not None:
            for group in learner.optimizer.param_groups:
                if not (group.get("fused") or group.get("capturable")):
                    stay |= {
                        id(learner.optimizer.state[p].get("step"))
                        for p in group["params"]
                        if p in learner.optimizer.state
                    }
        for tensor in self._tensors(owner):
            if id(tensor) not in stay and tensor.untyped_storage().nbytes() > 0:
                yield tensor

    def _berth(self, tensor: Tensor) -> Berth | None:
        return self._berths.get(memory_of(tensor))

    def _there(self) -> list[Berth]:
        """Return the berths that have visitors."""
        return list({id(b): b for b in self._berths.values() if b.visitors}.values())

    def _add(self, home: torch.UntypedStorage, away: torch.UntypedStorage) -> Berth:
        berth = Berth(home, away, home.nbytes())
        self._berths[memory_of_storage(home)] = self._berths[memory_of_storage(away)] = berth
        return berth

    def _fetch(self, tensors: Iterable[Tensor]) -> None:
        """Bring tensors to the device that are not there."""
        coming = []
        for tensor in tensors:
            if tensor.device != self.device or self.device.type == "cpu":
                storage = tensor.untyped_storage()
                berth = self._berth(tensor)
                if berth is None:
                    berth = self._add(storage, torch.UntypedStorage(0, device=self.device))
                if not berth.visitors:
                    berth.away.resize_(berth.size)
                    self._copies.copy(berth.away, berth.home)
                    coming.append(berth)
                if memory_of_storage(berth.home) == memory_of(tensor):
                    _lay(tensor, berth.away)
                    berth.visitors.append(tensor)
        mark = self._copies.mark() if coming else None
        for berth in coming:
            berth.arrived = mark

    def _adopt(self, owner: str) -> None:
        """Give what has been made on the device, or replaced there, a place at home."""
        for tensor in self._travelling(owner):
            if tensor.device == self.device:
                storage = tensor.untyped_storage()
                berth = self._berth(tensor)
                if berth is None:
                    berth = self._add(self._copies.room(storage.nbytes()), storage)
                if all(tensor is not visitor for visitor in berth.visitors):
                    berth.visitors.append(tensor)

    def _leave(self, berth: Berth) -> None:
        """Take what lies in a berth home, and free the device's memory."""
        self._copies.copy(berth.home, berth.away)
        for tensor in berth.visitors:
            if memory_of(tensor) == memory_of_storage(berth.away):
                _lay(tensor, berth.home)
        berth.visitors.clear()
        berth.away.resize_(0)

    def _send_home(self, tensors: Iterable[Tensor]) -> None:
        """Put tensors into memory of the CPU that suits, those that share a storage together."""
        lying: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and not (storage.device.type == "cpu" and self._copies.suits(storage)):
                lying.setdefault(memory_of(tensor), []).append(tensor)
        for held in lying.values():
            storage = held[0].untyped_storage()
            home = self._copies.room(storage.nbytes())
            _bytes(home).copy_(_bytes(storage))
            for tensor in held:
                _lay(tensor, home)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _lay(tensor: Tensor, storage: torch.UntypedStorage) -> None:
    """Have a tensor lie in a storage as it lies in its own."""
    twin = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    tensor.data = twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
