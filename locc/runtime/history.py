"""What a fit reports of its passes over the data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per sample, accuracy (None where the target has no classes), number of samples."""

    loss: float
    accuracy: float | None
    samples: int

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"
        return f"loss {self.loss:.4f}{accuracy}"


@dataclass(frozen=True)
class Epoch:
    """One pass over the data: mean loss and objectives over its steps, and the validation after it.

    `loss` is None in a pass that does not compute the user's loss (one that trains only inverses, say).
    `reused` is the share of its samples whose features had been kept (see `features` of `locc.compile`), None
    in a pass that keeps none.
    """

    number: int
    phase: str | None
    loss: float | None
    objectives: dict[str, float]
    seconds: float
    validation: Evaluation | None = None
    reused: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Every number by name: "loss", the objectives, "validation_loss", "validation_accuracy"."""
        found = {} if self.loss is None else {"loss": self.loss}
        found |= self.objectives
        if self.validation is not None:
            found["validation_loss"] = self.validation.loss
            if self.validation.accuracy is not None:
                found["validation_accuracy"] = self.validation.accuracy
        return found

    def __str__(self) -> str:
        phase = f" [{self.phase}]" if self.phase else ""
        loss = f"  loss {self.loss:.4f}" if self.loss is not None else ""
        objectives = "".join(f"  {name} {value:.4g}" for name, value in self.objectives.items())
        validation = f"  validation: {self.validation}" if self.validation else ""
        reused = f"  features reused: {self.reused:.0%}" if self.reused is not None else ""
        return f"epoch {self.number}{phase}{loss}{objectives}{validation}{reused}"


@dataclass
class History:
    """What `fit` saw, pass by pass.

    `interrupted` says whether Ctrl-C ended it, `stopped` why a callback did, if one did.
    """

    epochs: list[Epoch] = field(default_factory=list)
    interrupted: bool = False
    stopped: str | None = None

    def __str__(self) -> str:
        return "\n".join(str(epoch) for epoch in self.epochs)
