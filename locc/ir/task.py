"""A task: one of the model's predictions, and the part of the target that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from locc.ir.spec import TensorSpec


@dataclass(frozen=True)
class Task:
    """An output of the model that a local head imitates.

    Attributes:
        name: what the user calls it.
        value: the node that computes it.
        path: the keys by which it is found in what the forward returns; empty where it is returned alone.
    """

    name: str
    value: fx.Node
    path: tuple[Any, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """The spec of the prediction."""
        spec = self.value.meta["spec"]
        assert isinstance(spec, TensorSpec)
        return spec

    def own(self, target: Any) -> Any:
        """Return what a target that is nested as the output is holds for the task; any other target whole."""
        found = target
        for key in self.path:
            keyed = isinstance(found, Mapping) and key in found
            listed = isinstance(found, (tuple, list)) and isinstance(key, int) and key < len(found)
            if not (keyed or listed):
                return target
            found = found[key]
        return found
