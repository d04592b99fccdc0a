"""Modules in several processes, each at its own pace: `schedule="replay"`.

The first rank reads the data. Each hands what its last module makes to the next one, which keeps it in its
buffer; nobody waits for anybody while there is something to train on.
"""

from __future__ import annotations

import atexit
import time

import torch
import torch.distributed as dist

from locc.runtime.ranks.group import FOREVER, GRACE
from locc.runtime.ranks.links import Links
from locc.runtime.ranks.ranks import Ranks
from locc.runtime.replay import Batch, Workers

POLL = 2e-3
"""Seconds between two looks for a batch."""


class Pace:
    """What passes between this rank and its neighbours; every rank makes one."""

    def __init__(self, ranks: Ranks, most: int, device: torch.device) -> None:
        """Open the links; of what the next rank has not taken yet, `most` batches wait."""
        group = dist.new_group(backend="gloo", timeout=FOREVER)
        below = [ranks.rank - 1] if ranks.rank else []
        above = [ranks.rank + 1] if ranks.rank + 1 < ranks.size else []
        self._ranks, self._above = ranks, above
        self._links = Links(group, below, above, 0, device, most)
        self._links.at(0)
        atexit.register(self._close)

    def hand(self, phase: str | None, batch: Batch) -> None:
        """Hand a batch of a phase to the next rank, if there is one; returns at once."""
        for rank in self._above:
            self._links.send(rank, str(phase), (batch.inputs, batch.values))

    def awaits(self, workers: Workers, phase: str | None) -> bool:
        """Wait until a module of this rank, which is not the first, has something to read.

        Returns:
            False where rank 0 has ended the pass.

        Raises:
            RunError: there is nothing to read, and another rank has stopped, or is silent for too long.
        """
        below, idle = self._ranks.rank - 1, self._ranks.idle("a batch to train on")
        while not self._ranks.called():
            for name, (inputs, values) in self._links.taken(below):
                if name == str(phase):  # not of a pass that is over
                    workers.write(workers.own.start, Batch(inputs, values))
            if workers.ready():
                return True
            idle(below)
            time.sleep(POLL)
        return False

    def _close(self) -> None:
        self._links.close(GRACE if self._ranks.failed else None)
