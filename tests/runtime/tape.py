"""What records on the CPU as a CUDA graph does: operators and their tensors, and nothing of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from locc.ir.memory import memory_of
from locc.runtime.graphs import Start

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}
"""Operators whose results the CPU has to see before it goes on."""


@dataclass
class Tape:
    """A recording: what was called, on which tensors, and where the results lie."""

    calls: list[tuple[Any, Any, Any, list[Tensor]] | int] = field(default_factory=list)

    def replay(self, seeds: Sequence[int]) -> None:
        """Call the operators again; what they make goes to where it was."""
        with torch.no_grad():
            for call in self.calls:
                if isinstance(call, int):
                    torch.default_generator.manual_seed(seeds[call])
                    continue
                function, args, kwargs, made = call
                found = _tensors(function(*_there(args), **_there(kwargs)))
                if made:
                    for old, new in zip(made, found, strict=True):
                        old.detach().copy_(new)


class TapeRecorder(TorchDispatchMode):
    """Makes tapes. What recording changes in tensors that were there before is put back."""

    def record(self, run: Callable[[Start], None], streams: int) -> Tape:
        """Record what a function calls."""
        self.tape, self.own, self.before = Tape(), set[int](), dict[int, tuple[Tensor, Tensor]]()

        def start(number: int) -> None:
            assert number < streams
            self.tape.calls.append(number)
            torch.default_generator.manual_seed(number)

        try:
            with self:
                run(start)
        finally:
            for there, value in self.before.values():
                there.copy_(value)
        return self.tape

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA error")
        given = {memory_of(t) for t in _tensors((args, kwargs))}
        for tensor in _tensors((args, kwargs)):  # not all that writes to an argument says so
            self._save(tensor)
        given_now = _there(args), _there(kwargs)
        result = function(*args, **kwargs)
        found = _tensors(result)
        new = [t for t in found if memory_of(t) not in given]
        assert not new or len(new) == len(found), f"{function} returns both what is new and what is not"
        self.own |= {memory_of(t) for t in new}
        self.tape.calls.append((function, *given_now, _there(new)))
        return result

    def _save(self, tensor: Tensor) -> None:
        key = memory_of(tensor)
        if key not in self.own and key not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before[key] = whole, whole.clone()


def _there(value: Any) -> Any:
    """Return the same memory in the same shape, whatever happens to a tensor's shape later (`transpose_`)."""
    return tree_map_only(Tensor, Tensor.detach, value)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]
