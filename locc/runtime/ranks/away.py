"""Tensors of the modules that other ranks run: without memory, until somebody asks for the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from locc import files
from locc.files import Place
from locc.ir.memory import memory_of


@dataclass(frozen=True)
class _Lot:
    """Tensors that lay in one storage, perhaps a file, each with its offset, shape and strides."""

    size: int
    in_file: bool
    tensors: list[tuple[Tensor, int, torch.Size, tuple[int, ...]]]


class Away:
    """Takes memory from tensors and gives it back; they keep their identity, shape and dtype.

    Meanwhile one number stands for all elements of a tensor: NaN, where the dtype has it. To copy into such a
    tensor, or to add to it, raises.
    """

    def __init__(self, place: Place = files.DISK) -> None:
        """Start with nothing away; what was in a file returns to one in this place."""
        self._place = place
        self._lots: list[_Lot] = []
        self._ids: set[int] = set()
        self._stubs: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._ids

    def leave(self, tensors: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
        """Let go of the memory of tensors, but for what `kept` ones lie in; no other tensor may lie there."""
        needed = {memory_of(tensor) for tensor in kept}
        lying: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if tensor not in self and memory_of(tensor) not in needed and _is_plain(tensor):
                lying.setdefault(memory_of(tensor), []).append(tensor)
        for held in lying.values():
            places = [(t, int(t.storage_offset()), t.shape, t.stride()) for t in held]
            storage = held[0].untyped_storage()
            self._lots.append(_Lot(storage.nbytes(), files.in_file(storage), places))
            self._ids.update(map(id, held))
            for tensor in held:
                tensor.data = self._stub(tensor).expand(tensor.shape)

    def back(self) -> None:
        """Give all of them memory, in which nothing is set yet."""
        while self._lots:
            lot = self._lots.pop()
            storage = torch.UntypedStorage(lot.size, device=lot.tensors[0][0].device)
            for tensor, *place in lot.tensors:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, *place)
            if lot.in_file:
                files.move(self._place, [tensor for tensor, *_ in lot.tensors])
        self._ids.clear()

    def _stub(self, tensor: Tensor) -> Tensor:
        key = tensor.dtype, tensor.device
        if key not in self._stubs:
            number = math.nan if tensor.is_floating_point() or tensor.is_complex() else 0
            self._stubs[key] = torch.full((), number, dtype=tensor.dtype, device=tensor.device)
        return self._stubs[key]


def _is_plain(tensor: Tensor) -> bool:
    if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return tensor.numel() > 1 and not (tensor.is_conj() or tensor.is_neg())
