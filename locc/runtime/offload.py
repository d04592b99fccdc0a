"""What an owner needs between its turns is in mapped files: training larger than memory.

A tensor keeps its identity and gets a storage that is a file mapped into memory. So nothing is copied in or
out: the operating system reads what is touched, writes what has changed, and takes the memory back when it
is short of it. Here it is told what comes next and what has had its turn; no result depends on that.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from locc.errors import LoccError
from locc.ir import TrainingGraph
from locc.ir.captured import strip
from locc.ir.memory import memory_of
from locc.ir.view import node_tensors
from locc.runtime.learner import Learner
from locc.runtime.records import DISK

_FILES = "/proc/self/fd/"
"""By these names files are mapped, which have no other."""


class Offload:
    """Keeps parameters, buffers, optimizer state and gradients that wait for more in files without a name.

    Tensors of less than a page stay in memory. So does a buffer that the model replaces instead of writing
    to it.

    Args:
        place: "disk" for the folder of temporary files, or a folder.
        ir: whose tensors move now.
        learners: whose state moves after the turn in which it is made.

    Raises:
        LoccError: a tensor is not an ordinary one on the CPU, there is no room, or no file can be made there;
            nothing has moved then.
    """

    def __init__(self, place: str | Path, ir: TrainingGraph, learners: Mapping[str, Learner]) -> None:
        self._place, self._learners = place, learners
        named = [*ir.root.named_parameters(), *ir.root.named_buffers()]
        for path, tensor in named:
            _check(strip(path), tensor)
        self._held = {
            owner: list({id(t): t for n in ir.nodes(owner) for _, t in node_tensors(ir.root, n)}.values())
            for owner in ir.owners
        }
        self._at: str | None = None
        self._before: str | None = None
        self._next: dict[tuple[str | None, str | None], str] = {}
        every = [tensor for _, tensor in named]
        self._move(every)
        _advise(every, mmap.MADV_DONTNEED)

    def turn(self, owner: str) -> None:
        """Note that an owner runs: the one before it leaves, the one that came after it last time is read.

        Raises:
            LoccError: there is no room for what the one before it has made.
        """
        if owner == self._at:
            return
        if self._at is not None:
            self.keep(self._at)
            _advise(self._tensors(self._at), mmap.MADV_DONTNEED)
        self._next[self._before, self._at] = owner
        self._before, self._at = self._at, owner
        if following := self._next.get((self._before, owner)):
            _advise(self._tensors(following), mmap.MADV_WILLNEED)

    def keep(self, owner: str) -> None:
        """Move into files what an owner's optimizer has in memory, and its gradients that wait for more.

        Raises:
            LoccError: there is no room.
        """
        self._move(self._made(owner))

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor that lies in a file as well; a small one, in memory.

        Raises:
            LoccError: there is no room.
        """
        storage = tensor.untyped_storage()
        if storage.nbytes() < mmap.PAGESIZE:
            return tensor.detach().clone()
        return _on(self._files([storage])[0], tensor)

    def _made(self, owner: str) -> list[Tensor]:
        learner = self._learners.get(owner)
        if learner is None:
            return []
        found = [v for v in tree_leaves(list(learner.optimizer.state.values())) if isinstance(v, Tensor)]
        return [t for t in (*found, *(p.grad for p in learner.parameters)) if t is not None]

    def _tensors(self, owner: str) -> list[Tensor]:
        return self._held[owner] + self._made(owner)

    def _move(self, tensors: Iterable[Tensor]) -> None:
        """Put tensors into files, those that share a storage together; all of them or none."""
        lying: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if _why_not(tensor) is None:
                storage = tensor.untyped_storage()
                if storage.nbytes() >= mmap.PAGESIZE and not _mapped(storage):
                    lying.setdefault(memory_of(tensor), []).append(tensor)
        files = self._files([held[0].untyped_storage() for held in lying.values()])
        for held, file in zip(lying.values(), files, strict=True):
            for tensor in held:
                tensor.data = _on(file, tensor)
        if files:
            _libc().malloc_trim(0)  # between what is in use the C library keeps what was freed

    def _files(self, storages: list[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
        """Return copies of storages that are files without a name, mapped."""
        folder, found = None if self._place == DISK else self._place, []
        try:
            for storage in storages:
                with tempfile.TemporaryFile(prefix="locc-offload-", dir=folder) as file:
                    # Where the disk is full this is an error, and not a signal when a page is written.
                    os.posix_fallocate(file.fileno(), 0, storage.nbytes())
                    new = torch.UntypedStorage.from_file(f"{_FILES}{file.fileno()}", True, storage.nbytes())
                found.append(new.copy_(storage))
        except (OSError, RuntimeError) as error:
            size = sum(storage.nbytes() for storage in storages)
            raise LoccError(
                f"offload={str(self._place)!r} needs files of {size} bytes more, and there is no room or no "
                f"file can be made: {error}; make room, or name another folder"
            ) from error
        return found


def _on(file: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """Return what a tensor is on its own storage, on a copy of that."""
    twin = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return twin.set_(file, tensor.storage_offset(), tensor.shape, tensor.stride())


def _mapped(storage: torch.UntypedStorage) -> bool:
    return (storage.filename or "").startswith(_FILES)


def _advise(tensors: Iterable[Tensor], advice: int) -> None:
    """Tell the system about the files of tensors.

    What a process does not need goes from its memory, and stays in the system's own until that is short.
    """
    for tensor in tensors:
        if _why_not(tensor) is None and _mapped(storage := tensor.untyped_storage()):
            _libc().madvise(
                ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), ctypes.c_int(advice)
            )


def _why_not(tensor: Tensor) -> str | None:
    """Say why a tensor cannot lie in a file, if so."""
    if is_traceable_wrapper_subclass(tensor):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return f"no plain tensor ({tensor.layout}, {tensor.dtype})"
    return None if tensor.device.type == "cpu" else f"on {tensor.device}"


def _check(path: str, tensor: Tensor) -> None:
    why = _why_not(tensor)
    if sys.platform != "linux":
        why = f"on {sys.platform}, and files are mapped so on Linux only"
    if why is not None:
        raise LoccError(
            f"offload= keeps tensors of the CPU's memory in files, and '{path}' is {why}; leave it out"
        )


@functools.cache
def _libc() -> ctypes.CDLL:
    """Return the C library, which has no such name elsewhere."""
    return ctypes.CDLL(None)
