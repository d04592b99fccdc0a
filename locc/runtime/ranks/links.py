"""What carries values from one rank to another: ahead of who reads them, and behind who sends them.

A link is one direction between two ranks. A thread sends, a thread receives; both only wait in c10d, without
Python's lock, while the rank computes. How far a rank may run ahead of another is counted in steps: counted
in values, two ranks could each wait for what the other has not sent yet.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from locc.runtime.rows import Layout

HEAD = 1024
"""Bytes of a message's first part; what does not fit follows."""
_LENGTH = 8
_END = -1
"""The step of a link's last message."""

Message = tuple[int, str, Any]
"""Step, name and value."""


class Links:
    """The links of one rank.

    Attributes:
        depth: how many steps this rank may be ahead of one that reads from it, and one that it reads from
            may be ahead of it.
        errors: what ended a link to a rank, by rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        sources: Collection[int],
        targets: Collection[int],
        depth: int,
        device: torch.device,
        most: int | None = None,
    ) -> None:
        self.depth = depth
        self.errors: dict[int, Exception] = {}
        self._group, self._step, self._device, self._most = group, -1, device, most
        self._changed = threading.Condition()
        self._out: dict[int, deque[Message]] = {rank: deque() for rank in targets}
        self._in: dict[int, defaultdict[tuple[int, str], deque[Any]]] = {
            rank: defaultdict(deque) for rank in sources
        }
        self._closing = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, rank), daemon=True, name=f"locc {what} {rank}")
            for work, what, ranks in ((self._send_all, "to", targets), (self._receive_all, "from", sources))
            for rank in ranks
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, step: int, idle: Callable[[int], None]) -> None:
        """Start a step: wait until nobody who reads from this rank is further behind than `depth` steps.

        Args:
            step: its number.
            idle: called now and then while this waits, with the rank that it waits for.
        """
        self.at(step)
        for rank, queue in self._out.items():
            self._wait(rank, partial(_sent, queue, step - self.depth), idle)

    def at(self, step: int) -> None:
        """Say which step is under way: what is sent is of it, and what is received."""
        with self._changed:
            self._step = step
            self._changed.notify_all()

    def send(self, rank: int, name: str, value: Any) -> None:
        """Hand a value of the step under way to another rank; returns at once.

        Where more than `most` wait, the oldest goes; where the other rank is gone, all do.
        """
        with self._changed:
            queue = self._out[rank]
            queue.append((self._step, name, value))
            if self._most is not None and rank in self.errors:
                queue.clear()
            elif self._most is not None and len(queue) > self._most + 1:  # the first one may be on its way
                del queue[1]
            self._changed.notify_all()

    def receive(self, rank: int, name: str, idle: Callable[[int], None]) -> Any:
        """Wait for a value of the step under way; see `begin` for `idle`."""
        key, box = (self._step, name), self._in[rank]
        self._wait(rank, lambda: bool(box.get(key)), idle)
        with self._changed:
            value = box[key].popleft()
            if not box[key]:
                del box[key]
            return value

    def has_arrived(self, rank: int, name: str) -> bool:
        """Whether a value of the step under way is here."""
        with self._changed:
            return bool(self._in[rank].get((self._step, name)))

    def taken(self, rank: int) -> list[tuple[str, Any]]:
        """Return all that has arrived of the step under way, by name, without waiting."""
        with self._changed:
            found = [(name, value) for (_, name), values in self._in[rank].items() for value in values]
            self._in[rank].clear()
            return found

    def close(self, timeout: float | None) -> bool:
        """End the links when what was sent has gone; every rank closes them.

        Returns:
            Whether they ended within `timeout` seconds.
        """
        with self._changed:
            self._closing = True
            for queue in self._out.values():
                queue.append((_END, "", None))
            self._changed.notify_all()
        ends = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if ends is None else max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _wait(self, rank: int, ready: Callable[[], bool], idle: Callable[[int], None]) -> None:
        while True:
            with self._changed:
                # What has arrived counts, whatever has become of the link since.
                if ready() or (rank not in self.errors and self._changed.wait(0.2) and ready()):
                    return
            idle(rank)

    # ---- in the threads -------------------------------------------------------------------------

    def _guarded(self, work: Callable[[int], None], rank: int) -> None:
        try:
            work(rank)
        except Exception as error:
            with self._changed:
                self.errors.setdefault(rank, error)
                self._changed.notify_all()

    def _send_all(self, rank: int) -> None:
        queue = self._out[rank]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: queue)
                message = queue[0]
            self._send(rank, message)
            with self._changed:
                queue.popleft()
                self._changed.notify_all()
            if message[0] == _END:
                return

    def _receive_all(self, rank: int) -> None:
        while True:
            step, name, packed = self._receive_head(rank)
            if step == _END:
                return
            with self._changed:
                self._changed.wait_for(partial(self._near, step))
            value = self._receive_value(rank, packed)
            with self._changed:
                self._in[rank][step, name].append(value)
                self._changed.notify_all()

    def _near(self, step: int) -> bool:
        return self._closing or step <= self._step + self.depth

    def _send(self, rank: int, message: Message) -> None:
        step, name, value = message
        memory: list[Tensor] = []

        def packed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            parcel = _Parcel.of(leaf)
            memory.append(parcel.pack(leaf))
            return parcel

        head = pickle.dumps((step, name, tree_map(packed, value)))
        first = torch.zeros(HEAD, dtype=torch.uint8)
        first[:_LENGTH] = torch.tensor([len(head)]).view(torch.uint8)
        fits = head[: HEAD - _LENGTH]
        first[_LENGTH : _LENGTH + len(fits)] = torch.frombuffer(bytearray(fits), dtype=torch.uint8)
        dist.send(first, group=self._group, group_dst=rank)
        if rest := head[len(fits) :]:
            dist.send(torch.frombuffer(bytearray(rest), dtype=torch.uint8), group=self._group, group_dst=rank)
        for data in memory:
            if data.numel():
                dist.send(data, group=self._group, group_dst=rank)

    def _receive_head(self, rank: int) -> Message:
        first = torch.empty(HEAD, dtype=torch.uint8)
        dist.recv(first, group=self._group, group_src=rank)
        length = int(first[:_LENGTH].view(torch.int64))
        head = bytes(first[_LENGTH : _LENGTH + length].numpy())
        if length > len(head):
            rest = torch.empty(length - len(head), dtype=torch.uint8)
            dist.recv(rest, group=self._group, group_src=rank)
            head += bytes(rest.numpy())
        # The bytes come from a process of the same run, which torch.distributed itself trusts so.
        found: Message = pickle.loads(head)
        return found

    def _receive_value(self, rank: int, packed: Any) -> Any:
        def unpacked(part: Any) -> Any:
            if not isinstance(part, _Parcel):
                return part
            data = torch.empty(1, part.layout.size, dtype=torch.uint8)
            if data.numel():
                dist.recv(data, group=self._group, group_src=rank)
            return part.unpack(data, self._device)

        return tree_map(unpacked, packed)


def _sent(queue: deque[Message], step: int) -> bool:
    """Whether everything up to a step has gone."""
    return not queue or queue[0][0] > step


@dataclass(frozen=True)
class _Parcel:
    """How a tensor lies in memory, whose bytes follow: other strides may mean other kernels and bits."""

    layout: Layout
    on_cpu: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Parcel:
        return cls(Layout.of(tensor[None], 0, 1), tensor.device.type == "cpu")

    def pack(self, tensor: Tensor) -> Tensor:
        return self.layout.apart(tensor.detach().cpu()[None], 1)

    def unpack(self, data: Tensor, device: torch.device) -> Tensor:
        whole = self.layout.together(data)[0]
        return whole if self.on_cpu else whole.to(device)
