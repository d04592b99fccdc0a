"""What a step computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locc.errors import RunError


@dataclass(frozen=True)
class StepReport:
    """What one step computed; reading a tensor's value is what synchronises the device.

    Attributes:
        objectives: the local objectives by name, 0-d tensors.
        loss: the user's loss of this step before the update, 0-d; the sum of the objectives for a
            method that does not compute the loss.
        elsewhere: why the loss is not here: under the schedule "pipelined" a report is of one rank's modules.
    """

    objectives: dict[str, Tensor]
    network_loss: Tensor | None = None
    elsewhere: str = ""

    @property
    def loss(self) -> Tensor:
        """The user's loss, or the sum of the objectives where a method has none.

        Raises:
            RunError: there is neither.
        """
        if self.network_loss is not None:
            return self.network_loss
        if self.elsewhere:
            raise RunError(f"report.loss: {self.elsewhere}; the history of program.fit has the loss")
        if not self.objectives:
            raise RunError(
                "report.loss: this step computed neither the loss nor an objective, so there is no number to "
                "report; program.evaluate(loader) computes the loss"
            )
        return torch.stack([o.float() for o in self.objectives.values()]).sum()
