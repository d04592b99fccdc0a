"""Tensors whose storage is a file without a name, mapped into memory.

A tensor keeps its identity when it moves there. Nothing is copied in or out: the operating system reads what
is touched, writes what has changed, and takes the memory back when it is short of it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from locc.errors import LoccError, nearest
from locc.ir.captured import strip
from locc.ir.memory import memory_of

DISK = "disk"
Place = str | Path
"""`DISK` for the folder of temporary files, or a folder."""

_FILES = "/proc/self/fd/"
"""By these names files are mapped, which have no other."""
_ALONE = 2
"""The references to a storage that one tensor has, while Python holds on to the storage as well."""

_places: list[Place] = []


@contextmanager
def keeping(place: Place | None, tensors: Iterable[tuple[str, Tensor]] = ()) -> Iterator[None]:
    """Have tensors in files, within: those given, what modules register, and copies of what is in a file.

    All stay there, unless the block raises: then those given are as before.

    Args:
        place: where; with None nothing happens.
        tensors: what moves now, all or none, by path.

    Raises:
        LoccError: a tensor is not an ordinary one on the CPU, there is no room, or no file can be made there.
    """
    if place is None:
        yield
        return
    every = list(tensors)
    for path, tensor in every:
        check(path, tensor)
    back = move(place, [tensor for _, tensor in every])

    def registered(_: nn.Module, __: str, tensor: Tensor | None) -> None:
        # what shares its storage with something else moves with it, when all of a model is known
        alone = tensor is not None and why_not(tensor) is None and _references(tensor) <= _ALONE
        if tensor is not None and alone:
            move(place, [tensor])

    hooks = [
        register_module_parameter_registration_hook(registered),
        register_module_buffer_registration_hook(registered),
    ]
    _places.append(place)
    try:
        yield
    except BaseException:
        back()
        raise
    finally:
        _places.pop()
        for hook in hooks:
            hook.remove()


@contextmanager
def deferred(place: Place = DISK) -> Iterator[None]:
    """Build models that need not fit in memory: `with locc.deferred(): model = GPT()`.

    Each parameter and buffer goes to a file without a name as soon as its module has it, and is initialised
    there as the model's code does it: with the same numbers as without. Compile the model with
    `offload="disk"`. A model on the `meta` device is an alternative: `compile` initialises it, module by
    module.

    Args:
        place: "disk" for the folder of temporary files, or a folder.

    Raises:
        LoccError: the place is neither, or this system is not Linux; within, there is no room.
    """
    check_place("place", place, (DISK,))
    if sys.platform != "linux":
        raise LoccError(f"locc.deferred() maps files into memory, on Linux only, and this is {sys.platform}")
    with keeping(place):
        yield


def copy(tensor: Tensor, place: Place | None = None) -> Tensor:
    """Return a copy: in a file where there is a place, or within `keeping` where the tensor is in one itself.

    A small tensor's is in memory.

    Raises:
        LoccError: there is no room.
    """
    if why_not(tensor) is None:
        storage = tensor.untyped_storage()
        if place is None and _places and in_file(storage):
            place = _places[-1]
        if place is not None and storage.nbytes() >= mmap.PAGESIZE:
            return _on(_files(place, [storage])[0], tensor)
    return tensor.detach().clone()


def gradients(of: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return gradients, None of what is not used; within `keeping` each goes to a file as it is made."""
    away = [tensor.register_hook(put_away) for tensor in tensors] if _places else []
    try:
        return torch.autograd.grad(of, tensors, allow_unused=True)
    finally:
        for hook in away:
            hook.remove()


def put_away(tensor: Tensor) -> Tensor:
    """Return a computed tensor, within `keeping` in a file."""
    if _places:
        tensor = tensor.detach()
        move(_places[-1], [tensor])
    return tensor


def move(place: Place, tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Put tensors into files, those that share a storage together; all of them or none.

    Tensors of less than a page stay in memory, as does what cannot lie in a file.

    Returns:
        What puts them back.

    Raises:
        LoccError: there is no room.
    """
    lying: dict[int, list[Tensor]] = {}  # by storage
    for tensor in tensors:
        if why_not(tensor) is None:
            storage = tensor.untyped_storage()
            if storage.nbytes() >= mmap.PAGESIZE and not in_file(storage):
                lying.setdefault(memory_of(tensor), []).append(tensor)
    files = _files(place, [held[0].untyped_storage() for held in lying.values()])
    for held, file in zip(lying.values(), files, strict=True):
        _put(held, file)
    if files:
        _libc().malloc_trim(0)  # between what is in use the C library keeps what was freed

    return partial(fetch, [tensor for held in lying.values() for tensor in held])


def fetch(tensors: Iterable[Tensor]) -> None:
    """Take what is in files into memory, tensors that share a storage together."""
    lying: dict[int, list[Tensor]] = {}  # by storage
    for tensor in filter(lies, tensors):
        lying.setdefault(memory_of(tensor), []).append(tensor)
    for held in lying.values():
        _put(held, held[0].untyped_storage().clone())


def in_file(storage: torch.UntypedStorage) -> bool:
    """Whether a storage is a file of this kind."""
    return (storage.filename or "").startswith(_FILES)


def lies(tensor: Tensor) -> bool:
    """Whether a tensor is in such a file."""
    return why_not(tensor) is None and in_file(tensor.untyped_storage())


def advise(tensors: Iterable[Tensor], advice: int) -> None:
    """Tell the system about the files of tensors.

    What a process does not need goes from its memory, and stays in the system's own until that is short.
    """
    for storage in (tensor.untyped_storage() for tensor in tensors if lies(tensor)):
        _libc().madvise(
            ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), ctypes.c_int(advice)
        )


def why_not(tensor: Tensor) -> str | None:
    """Say why a tensor cannot lie in a file, if so."""
    if is_traceable_wrapper_subclass(tensor):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return f"no plain tensor ({tensor.layout}, {tensor.dtype})"
    if tensor.device.type != "cpu":
        return f"on {tensor.device}"
    return None if tensor.untyped_storage().device.type == "cpu" else "fake"  # while a model is traced


def check(path: str, tensor: Tensor) -> None:
    """Refuse what cannot lie in a file.

    Raises:
        LoccError: the tensor at this path cannot.
    """
    why = why_not(tensor)
    if sys.platform != "linux":
        why = f"on {sys.platform}, and files are mapped so on Linux only"
    if why is not None:
        raise LoccError(
            f"offload= keeps tensors of the CPU's memory in files, and '{strip(path)}' is {why}; leave it out"
        )


def check_place(option: str, place: object, known: Sequence[str]) -> None:
    """Refuse, as the value of an option, what is neither one of the known places nor a folder.

    Raises:
        LoccError: it is neither.
    """
    if place not in known and not (isinstance(place, (str, Path)) and Path(place).is_dir()):
        raise LoccError(
            f"{option}={place!r} is neither {' nor '.join(map(repr, known))} nor an existing folder; "
            + nearest(str(place), known)
        )


def _put(tensors: Iterable[Tensor], storage: torch.UntypedStorage) -> None:
    for tensor in tensors:
        tensor.data = _on(storage, tensor)


def _on(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """Return what a tensor is on its own storage, on a copy of that."""
    twin = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _references(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _files(place: Place, storages: list[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
    """Return copies of storages that are files without a name, mapped."""
    folder, found = None if place == DISK else place, []
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
            f"offload={str(place)!r} needs files of {size} bytes more, and there is no room or no "
            f"file can be made: {error}; make room, or name another folder"
        ) from error
    return found


@functools.cache
def _libc() -> ctypes.CDLL:
    """Return the C library, which has no such name elsewhere."""
    return ctypes.CDLL(None)
