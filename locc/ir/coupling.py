"""State that modules share beside their boundary values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coupling:
    """A parameter, buffer or tensor that several modules use.

    Attributes:
        tensor: its path in the model.
        owners: the modules that use it.
        text: one sentence that says who does what with it.
        live: whether what one of them does reaches the others; not for a parameter that each has a copy of.
    """

    tensor: str
    owners: tuple[str, ...]
    text: str
    live: bool = True

    def __str__(self) -> str:
        return self.text
