"""The entries of a certificate."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckRun:
    """One check: whether it held, on what it ran, and how long it took (not part of what is saved).

    `status` is "held"; "partial", where a sum over the outputs stood in for the loss; or "incomplete". A
    check that fails raises `LocalityError` instead.
    """

    name: str
    status: str
    detail: str
    seconds: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ObjectiveFacts:
    """A local objective, the parameters that it reaches, and the checks that saw no others."""

    name: str
    reaches: tuple[str, ...]
    proved_by: tuple[str, ...]


@dataclass(frozen=True)
class OwnerFacts:
    """What is known of one module, or of an auxiliary that trains alone.

    Attributes:
        name: the owner.
        index: its position in forward order (an auxiliary has that of the module it serves).
        auxiliary: whether it is an auxiliary that trains alone.
        frozen: whether the user has frozen all its parameters: it runs and passes on its value.
        parameters: paths of the parameters that it owns.
        count: number of their elements.
        networks: auxiliary networks that it runs.
        objectives: its local objectives.
        forward_locked: it needs values that earlier modules compute from the batch.
        update_waits_for: later modules whose forward its update waits for (empty: not update-locked).
        backward_waits_for: later modules whose backward pass its update waits for (empty: not
            backward-locked).
        backward_depth: the longest chain of such backward passes.
        depends_on: later modules whose values it trains on, those of earlier steps included, for which it
            does not wait.
        trains_on_gradient: the gradient that came through a later module's layers and in which its
            objective is linear, or None.
        gradient_hops: how many modules' layers that gradient crossed.
        peak_memory: bytes of activations and gradients that are alive at most while its code runs, those
            of other owners included; None where no estimate could be made.
    """

    name: str
    index: int
    auxiliary: bool
    frozen: bool
    parameters: tuple[str, ...]
    count: int
    networks: tuple[str, ...]
    objectives: tuple[ObjectiveFacts, ...]
    forward_locked: bool
    update_waits_for: tuple[str, ...]
    backward_waits_for: tuple[str, ...]
    backward_depth: int
    depends_on: tuple[str, ...]
    trains_on_gradient: str | None
    gradient_hops: int
    peak_memory: int | None

    @property
    def update_locked(self) -> bool:
        """Whether its update waits for a later module's forward."""
        return bool(self.update_waits_for)

    @property
    def backward_locked(self) -> bool:
        """Whether its update waits for a later module's backward pass."""
        return bool(self.backward_waits_for)


@dataclass(frozen=True)
class TableRow:
    """The columns of the survey's Table I (Duan & Principe 2022), read off the graph.

    `backward_pass` is "none", "n hop(s)" where gradients cross n modules in a row without training a
    module by the chain rule, or "end to end" where they do.
    """

    auxiliary_model: bool
    forward_pass: bool
    backward_pass: str


@dataclass(frozen=True)
class Memory:
    """What one step in lockstep needs, in bytes; what other schedules keep of several batches comes on top.

    Attributes:
        batch: number of samples of the step.
        parameters: parameters and buffers, auxiliaries included.
        optimizer: the optimizers' state after one update.
        peak: activations, what autograd saves, and gradients, at the worst moment, beyond these two. What
            operators and optimizers allocate and free inside one call is not counted.
        at: the owner whose code runs at that moment.
        owners: for each owner, the most that is alive while its code runs, counted in the same way.
    """

    batch: int
    parameters: int
    optimizer: int
    peak: int
    at: str
    owners: tuple[tuple[str, int], ...]

    def of(self, owner: str) -> int | None:
        """Return the most that is alive while an owner's code runs, or None if it runs none."""
        return dict(self.owners).get(owner)
