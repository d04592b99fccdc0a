"""The tensors that a check runs on: shapes alone, PyTorch's fake ones, or real ones."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode

from locc.ir import TrainingGraph
from locc.proof.experiment.dispatch import Kernel, evaluate, memory_of
from locc.proof.experiment.shapes import Shapes


class Real:
    """The program's tensors as they are."""

    title = "real tensors"
    mode: AbstractContextManager[Any] = nullcontext()
    """Entered where the program's own code runs."""
    kernel: Kernel = staticmethod(evaluate)
    """Runs an operator."""

    def of(self, value: Any) -> Any:
        """Return what stands for a value of the batch or a tensor of the program."""
        return value.clone() if isinstance(value, Tensor) else value

    def stands_for(self, tensor: Tensor) -> Tensor:
        """Return what stands for a tensor that code has met, which may hold on to the original."""
        return tensor

    def enter(self, ir: TrainingGraph, optimizers: Iterable[optim.Optimizer] = ()) -> None:
        """Replace the tensors of the program and its optimizers; `preserved` puts them back."""


class Meta(Real):
    """Tensors of the meta device: shapes alone, at a cost that does not depend on sizes.

    Fails on a tensor that the program holds neither as parameter nor as buffer.
    """

    title = "fake tensors (meta)"

    def __init__(self) -> None:
        self.mode, self.kernel = torch.device("meta"), (shapes := Shapes())
        self.protected = shapes.protected
        self.memo: dict[int, tuple[Tensor, Tensor]] = {}  # tensor, twin: kept, so that no other gets its id

    def of(self, value: Any) -> Any:
        """Return the one twin of a tensor."""
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        if id(value) not in self.memo:
            self.protected.update(m for m in [memory_of(value)] if m is not None)
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            held = isinstance(value, nn.Parameter)
            self.memo[id(value)] = value, nn.Parameter(made, value.requires_grad) if held else made
        return self.memo[id(value)][1]

    def enter(self, ir: TrainingGraph, optimizers: Iterable[optim.Optimizer] = ()) -> None:
        """Put a twin in the place of each parameter, buffer and optimizer state."""
        for module in ir.root.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = self.of(tensor)
            flat = getattr(module, "_flat_weights", None)
            if isinstance(flat, list):  # what a recurrent layer computes with
                flat[:] = [self.of(w) for w in flat]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self.of(p) for p in group["params"]]
                if group.get("fused"):
                    group["fused"] = None  # its kernels take no shapes
            state = [(self.of(p), self._entries(held)) for p, held in optimizer.state.items()]
            optimizer.state.clear()
            optimizer.state.update(state)

    def stands_for(self, tensor: Tensor) -> Tensor:
        """Return the twin of a real tensor, if it has one."""
        return self.memo.get(id(tensor), (tensor, tensor))[1]

    def _entries(self, held: dict[str, Any]) -> dict[str, Any]:
        """Counters of one element stay real: optimizers read them."""
        return {k: self.of(v) if isinstance(v, Tensor) and v.dim() else v for k, v in held.items()}


class Fake(Real):
    """PyTorch's fake tensors, which accept real ones beside them.

    Parameters stay, so that leaves are known.
    """

    title = "fake tensors"

    def __init__(self) -> None:
        self.mode = self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, value: Any) -> Any:
        """Return a fake of a tensor."""
        return self.fake.from_tensor(value) if isinstance(value, Tensor) else value

    def enter(self, ir: TrainingGraph, optimizers: Iterable[optim.Optimizer] = ()) -> None:
        """Put a fake in the place of each buffer."""
        for module in ir.root.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.of(buffer)


def reason(error: Exception) -> str:
    """Return why a program does not run in a world, in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}"
