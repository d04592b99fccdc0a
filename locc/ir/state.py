"""Tensors that live across steps: `ir.state`, and what `ir.delay` is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from locc.errors import RunError
from locc.ir.spec import TensorSpec

RESIZE = ("reset", "error")


class State(nn.Module):
    """Holds one state of an owner: a buffer, saved and moved like any other.

    A state whose spec has the batch dimension has no rows until the first batch comes.

    Attributes:
        value: the state as it was before the step that runs.
        initial: what it starts from, of a shape that `spec` broadcasts.
        owner: the owner that reads and assigns it.
        resize: "reset" starts anew when the batch size changes; "error" refuses such a batch.
        delays: whether it only keeps another value for later steps.
        starts: `initial` where it is one number, as declared.
    """

    value: Tensor
    initial: Tensor

    def __init__(
        self,
        owner: str,
        name: str,
        spec: TensorSpec,
        initial: float | Tensor = 0.0,
        resize: str = "reset",
        delays: bool = False,
    ) -> None:
        super().__init__()
        self.owner, self.name, self.spec, self.resize, self.delays = owner, name, spec, resize, delays
        self.register_buffer("initial", torch.as_tensor(initial, dtype=spec.dtype).detach().clone())
        self.starts = float(self.initial) if self.initial.dim() == 0 else None
        self.register_buffer("value", self._start(0))

    def admit(self, batch: int) -> None:
        """Raise RunError where the state holds another batch size, and was declared not to start anew."""
        found, wanted = tuple(self.value.shape), self.spec.concrete(batch)
        if found != wanted and self.resize == "error" and self.value.numel():
            raise RunError(
                f"state '{self.name}' of '{self.owner}' holds {found} from the step before, and a batch of "
                f"{batch} needs {wanted}; keep the batch size (drop_last=True), or declare the state with "
                "resize='reset'"
            )

    def begin(self, batch: int) -> None:
        """Start anew for a step on `batch` samples, if the state is of another size."""
        if tuple(self.value.shape) != self.spec.concrete(batch):
            self.value = self._start(batch)

    def _start(self, batch: int) -> Tensor:
        return self.initial.expand(self.spec.concrete(batch)).contiguous().clone()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a value of this shape can be this state's, for some batch size."""
        dim = self.spec.batch_dim
        if dim is None or len(shape) != len(self.spec.shape):
            return shape == tuple(self.value.shape)
        extent: Any = self.spec.shape[dim]
        batch, rest = divmod(shape[dim] - extent.offset, extent.scale)
        return rest == 0 and shape == self.spec.concrete(batch)


def states(root: nn.Module) -> Iterator[tuple[str, State]]:
    """Yield every state under the root with the path of its module."""
    yield from ((path, module) for path, module in root.named_modules() if isinstance(module, State))


def begin(root: nn.Module, batch: int) -> None:
    """Make every state under the root ready for a step on `batch` samples, or none.

    Raises:
        RunError: see `State.admit`.
    """
    begin_all([state for _, state in states(root)], batch)


def begin_all(found: Sequence[State], batch: int) -> None:
    """Make the states ready for a step on `batch` samples, or none; raises as `begin` does."""
    for state in found:
        state.admit(batch)
    for state in found:
        state.begin(batch)


def renewed(flag: Tensor, value: Tensor, initial: Tensor, dim: int = 0) -> Tensor:
    """Return `initial` where a flag is set and `value` elsewhere.

    Args:
        flag: a bool [] for the whole state, or [B] for each sample.
        value: of any shape; where the flag is [B], with B samples along `dim`.
        initial: broadcasts to the shape of `value`.
        dim: the batch dimension of `value`.
    """
    if flag.dim():
        flag = flag.reshape([-1 if i == dim else 1 for i in range(value.dim())])
    return torch.where(flag.to(torch.bool), initial, value)
