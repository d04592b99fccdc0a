"""`fixed-aux`: local classifiers that stay random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from locc.rewrite import (
    LAYOUT,
    LOCAL_LOSS,
    POSITIONS,
    AttachHeads,
    LocalLoss,
    LossLike,
    Method,
    OutputLoss,
    Pass,
    option,
)


@dataclass(frozen=True)
class FixedAux(Method):
    """Local errors: each module trains on the loss of a random linear classifier that never changes.

    The classifier of module k is M_k h_k with M_k ~ U(+-1/sqrt(d)), in a buffer, on the mean over positions
    of a map; sg h_k is passed on. Mostafa, Ramesh & Cauwenberghs, "Deep supervised learning using local
    errors" (2018). The paper's loss and distribution of M could not be checked: these are the user's loss and
    locc's own scale. The control with a classifier that learns is `dgl` with head="linear".
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = (
        "Mostafa, Ramesh & Cauwenberghs 2018, Deep supervised learning using local errors"
    )

    layout: str | None = option(None, **LAYOUT)
    positions: float | None = option(None, **POSITIONS)
    local_loss: LossLike | None = option(None, **LOCAL_LOSS)

    def passes(self) -> Sequence[Pass]:
        """Return the fixed heads, their losses, and the loss at the output."""
        heads = AttachHeads("fixed", self.layout, positions=self.positions)
        return (heads, LocalLoss(self.local_loss), OutputLoss())
