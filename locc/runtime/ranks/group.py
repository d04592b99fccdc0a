"""Processes that agree on what they do, and know why one of them stops."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from locc.errors import LoccError, RunError
from locc.runtime.ranks.away import Away
from locc.runtime.ranks.links import Links

GRACE = 3.0
"""Seconds in which a rank that ends may still say why."""
FOREVER = timedelta(days=365)


@dataclass
class Group:
    """This process among those that train a program.

    Attributes:
        rank: the number of this one.
        size: how many there are.
        timeout: seconds of silence after which a rank that is waited for counts as lost.
        width: how many ranks run one stage, each on a share of the batch.
        stages: the modules of each stage, once they are shared out; as many as ranks, where `width` is 1.
        failed: whether training among them has broken off.
        at: the step that is under way.
        away: what has no memory here.
    """

    rank: int
    size: int
    timeout: float
    width: int = 1
    stages: list[list[str]] = field(default_factory=list)
    failed: bool = False
    at: int = 0
    away: Away = field(default_factory=Away)

    def __post_init__(self) -> None:
        Group._made += 1
        self._key = f"locc/{Group._made}/failed"
        self._calls = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        self._store = dist.distributed_c10d._get_default_store()
        self._links: Links | None = None
        self._looked = 0.0
        self._broken: dict[int, float] = {}

    _made = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which talks, writes and decides when to stop."""
        return self.rank == 0

    # ---- agreement ------------------------------------------------------------------------------

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compare what must be the same on all ranks.

        Raises:
            LoccError: names two ranks, what differs, and how.
        """
        mine = {**facts, "the version of PyTorch": torch.__version__, "Python": platform.python_version()}
        every = self.gathered(mine)
        for other, theirs in enumerate(every):
            what = next((what for what, value in every[0].items() if theirs.get(what) != value), None)
            if what is not None:
                first, own = every[0][what], theirs.get(what)
                raise LoccError(
                    f"rank 0 and rank {other} do not run the same program: {what} is {first!r} on rank 0 and "
                    f"{own!r} on rank {other}; start every rank with the same script, model, splits and "
                    "options"
                )

    def gathered(self, value: Any) -> list[Any]:
        """Return the value of each rank; every rank calls it."""
        found: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(found, value, group=self._calls))
        return found

    def collected(self, value: Any) -> list[Any] | None:
        """Return the value of each rank on rank 0, None elsewhere; every rank calls it."""
        found: list[Any] | None = [None] * self.size if self.leads else None
        self._call(lambda: dist.gather_object(value, found, dst=self._global(0), group=self._calls))
        return found

    def told(self, value: Any) -> Any:
        """Return the value of rank 0; every rank calls it."""
        held = [value]
        self._call(lambda: dist.broadcast_object_list(held, src=self._global(0), group=self._calls))
        return held[0]

    def together(self, work: Callable[[dist.ProcessGroup], Any]) -> None:
        """Run collectives of another library among all ranks; every rank calls it."""
        self._call(lambda: work(self._calls))

    def share(self, tensors: Sequence[tuple[Tensor, int]]) -> None:
        """Set each tensor to what the rank beside it holds; every rank calls it with the same ones.

        One that is away here stays so.
        """
        for tensor, source in tensors:
            held = tensor.detach().cpu().contiguous()
            if held.dtype == torch.bool:
                held = held.view(torch.uint8)
            self._call(partial(dist.broadcast, held, src=self._global(source), group=self._calls))
            if source != self.rank and tensor not in self.away:
                with torch.no_grad():
                    tensor.copy_(held.view(tensor.dtype))

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self._calls, rank)

    def _call(self, collective: Callable[[], Any], text: str = "a rank is gone") -> None:
        try:
            collective()
        except RuntimeError as error:
            time.sleep(GRACE)  # whoever has ended may be about to say why
            raise self._stopped(self._cause() or self._publish(f"{text} ({_short(error)})")) from error

    def _opened(self) -> Links:
        if self._links is None or self.failed:
            raise RunError(
                "training among ranks has broken off, and their modules are not of one step any more; start "
                "anew, from a checkpoint"
            )
        return self._links

    # ---- failures -------------------------------------------------------------------------------

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Tell the other ranks why this one stops, should it stop inside."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks why this one stops."""
        known, self.failed = self.failed, True
        if not known:
            self._publish(
                f"{self._named(self.rank)} stopped at step {self.at}: {type(error).__name__}: {error}"
            )

    def _close(self) -> None:
        """End the links, when this process ends: a thread that waits in c10d would abort it."""
        if self._links is not None and not self._links.close(GRACE if self.failed else None):
            sys.stdout.flush()
            os._exit(1)  # a rank hangs, and nothing else lets go of a receive from it

    def idle(self, what: str) -> Callable[[int], None]:
        """Return what to call now and then, with the rank that is waited for, in a wait that begins now."""
        return partial(self._wait, time.monotonic(), what)

    def _wait(self, started: float, what: str, rank: int) -> None:
        """Look around while waiting for a rank."""
        now, broken = time.monotonic(), self._opened().errors.get(rank)
        if now > self._looked + 1.0 or broken is not None:
            self._looked = now
            if cause := self._cause():
                raise self._stopped(cause)
        if broken is not None:
            if now < self._broken.setdefault(rank, now) + GRACE:
                time.sleep(0.1)
                return
            text = f"{self._named(rank)} is gone ({_short(broken)})"
        elif now > started + self.timeout:
            text = f"{self._named(rank)} has been silent for {self.timeout:g} s"
        else:
            return
        raise self._stopped(
            self._publish(f"{text}; rank {self.rank} waited for {what} of step {self.at}"),
        )

    def _named(self, rank: int) -> str:
        names = (
            ", ".join(f"'{n}'" for n in self.stages[rank // self.width]) if self.stages else "no modules yet"
        )
        return f"rank {rank} ({names})"

    def _cause(self) -> str | None:
        with suppress(RuntimeError):  # the store went with the rank that held it
            if self._store.check([self._key]):
                return str(json.loads(self._store.get(self._key)))
        return None

    def _publish(self, text: str) -> str:
        """Say why training stops, unless somebody has said so before; return what was said first."""
        with suppress(RuntimeError):
            return str(json.loads(self._store.compare_set(self._key, "", json.dumps(text))))
        return text

    def _stopped(self, cause: str) -> RunError:
        self.failed = True
        return RunError(f"training stopped on every rank: {cause}. Start anew, from the last checkpoint")


def _short(error: Exception) -> str:
    """Return what c10d says of a connection, without its advice."""
    return str(error).partition(". ")[0].rpartition("] ")[2]
