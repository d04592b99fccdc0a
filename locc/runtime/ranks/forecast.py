"""What a pipeline of some ranks would take, from what its modules take here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locc.errors import LoccError
from locc.runtime.ranks.placement import Cost, shared_out
from locc.runtime.ranks.ranks import DEPTH


@dataclass(frozen=True)
class Forecast:
    """A simulated pass over the data.

    Attributes:
        stages: the modules of each rank.
        busy: seconds of a step on each rank.
        sent: bytes that each rank sends in a step.
        batches: steps of the pass.
        seconds: of the pass.
        bubble: share of the ranks' time in which they wait.
    """

    stages: list[list[str]]
    busy: list[float]
    sent: list[int]
    batches: int
    seconds: float
    bubble: float

    @property
    def speedup(self) -> float:
        """How much faster the pass is than on one rank."""
        return sum(self.busy) * self.batches / self.seconds

    def __str__(self) -> str:
        return (
            f"{len(self.stages)} ranks, {self.batches} batches: {self.seconds:.3f} s, {self.speedup:.2f} "
            f"times as fast as one rank; they wait {self.bubble:.1%} of the time, the slowest takes "
            f"{max(self.busy) * 1e3:.2f} ms a step, and one sends {max(self.sent) / 2**20:.2f} MiB in it"
        )


def forecast(
    costs: Mapping[str, Cost], ranks: int, batches: int, bandwidth: float | None, latency: float
) -> Forecast:
    """Simulate a pass: each rank's step t comes after its step t-1 and after what it receives of step t.

    Args:
        costs: of the modules, in the order in which values pass.
        ranks: how many.
        batches: steps.
        bandwidth: bytes a second of each link; None for one that costs nothing.
        latency: seconds until a value arrives, beside its bytes.

    Raises:
        LoccError: there are fewer modules than ranks, or a number makes no sense.
    """
    if not 1 <= ranks <= len(costs) or batches < 1 or latency < 0 or (bandwidth or 1.0) <= 0:
        raise LoccError(
            f"ranks={ranks}, batches={batches}, bandwidth={bandwidth}, latency={latency}: give 1 to "
            f"{len(costs)} ranks (there are so many modules), at least one batch, bytes a second above 0, "
            "and seconds"
        )
    stages = shared_out({name: cost.seconds for name, cost in costs.items()}, ranks)
    rank_of = {name: rank for rank, names in enumerate(stages) for name in names}
    wires = _wires(costs, stages, rank_of, bandwidth, latency)
    busy = [sum(costs[name].seconds for name in names) for names in stages]
    begun = [[0.0] * batches for _ in stages]
    ended = [0.0] * ranks
    for t in range(batches):
        for rank in range(ranks):
            start = ended[rank]
            for source, target, ready, takes in wires:
                if target == rank:
                    start = max(start, begun[source][t] + ready + takes)
                # A rank goes on when what it sent DEPTH steps ago has gone, which a reader takes at most
                # DEPTH steps ahead.
                if source == rank and t >= 2 * DEPTH:
                    start = max(start, begun[target][t - 2 * DEPTH])
            begun[rank][t], ended[rank] = start, start + busy[rank]
    seconds = max(ended)
    sent = [sum(_bytes(costs, names, rank_of)) for names in stages]
    return Forecast(stages, busy, sent, batches, seconds, 1 - sum(busy) * batches / (seconds * ranks))


def _wires(
    costs: Mapping[str, Cost],
    stages: Sequence[Sequence[str]],
    rank_of: Mapping[str, int],
    bandwidth: float | None,
    latency: float,
) -> list[tuple[int, int, float, float]]:
    """Return (source, target, seconds into the step until all is computed, seconds on the way)."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for rank, names in enumerate(stages):
        spent = 0.0
        for name in names:
            for size, readers in costs[name].sends.values():
                for target in {rank_of[reader] for reader in readers} - {rank}:
                    _, before = found.get((rank, target), (0.0, latency))
                    takes = before + (size / bandwidth if bandwidth is not None else 0.0)
                    found[rank, target] = spent + costs[name].first, takes
            spent += costs[name].seconds
    return [(*ends, *times) for ends, times in found.items()]


def _bytes(costs: Mapping[str, Cost], names: Sequence[str], rank_of: Mapping[str, int]) -> list[int]:
    here = {rank_of[name] for name in names}
    return [
        size * len({rank_of[reader] for reader in readers} - here)
        for name in names
        for size, readers in costs[name].sends.values()
    ]
