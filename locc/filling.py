"""Gives the tensors of a model on the `meta` device their memory and values, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from locc import files
from locc.errors import LoccError, nearest
from locc.files import Place
from locc.runtime.mapped import read

_RESETS = ("reset_parameters", "_reset_parameters")
"""How modules of PyTorch initialise themselves."""


@contextmanager
def filled(model: nn.Module, weights: str | Path | None, place: Place | None, seed: int) -> Iterator[None]:
    """Fill a model in which something is on the `meta` device; one that has its values stays as it is.

    Submodules come first, in order, as where a model is built; parameters are new objects, tied ones one. The
    caller undoes it: this changes the tables of the modules alone.

    Args:
        model: the model.
        weights: a safetensors file or a folder of them, with values by name. A tensor that is not in it has
            those that its module's own `reset_parameters()` draws.
        place: where the tensors are; None for memory.
        seed: of what is drawn.

    Raises:
        LoccError: a module cannot initialise what is not in the files; these hold tensors of other names or
            shapes, or cannot be read; or they are given for a model that has its values.
    """
    known = _read(Path(weights)) if weights is not None else {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    empty = any(t.is_meta for _, t in tensors)
    if weights is not None and not empty:
        raise LoccError(
            f"weights={str(weights)!r} fills a model on the meta device, and this one has its values; build "
            "it within torch.device('meta'), or load them by load_state_dict"
        )
    for name in known:
        if name not in dict(tensors):
            raise LoccError(
                f"weights={str(weights)!r} holds '{name}', which the model does not have; "
                + nearest(name, dict(tensors))
            )
    if empty:
        with files.keeping(place), torch.no_grad():
            torch.manual_seed(seed)
            _Filling(known, str(weights)).fill(model, "")
    yield


class _Filling:
    def __init__(self, known: Mapping[str, Tensor], source: str) -> None:
        self.known, self.source = known, source
        # what was there, kept so that its id stays its own, and what is
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen: set[nn.Module] = set()
        default = torch.get_default_device()
        self.device = torch.device("cpu") if default.type == "meta" else default

    def fill(self, module: nn.Module, path: str) -> None:
        """Fill a module, those inside of it first."""
        self.seen.add(module)
        for name, child in module.named_children():
            if child not in self.seen:
                self.fill(child, f"{path}{name}.")
        found = {name: tensor for name, tensor in _own(module).items() if tensor.is_meta}
        new = [name for name, tensor in found.items() if id(tensor) not in self.made]
        for name, tensor in found.items():
            setattr(module, name, self._twin(tensor))
        lacking = [name for name in new if f"{path}{name}" not in self.known]
        if lacking:
            kept = [(t, files.copy(t)) for name, t in _own(module).items() if name not in new]
            self._reset(module, f"{path}{lacking[0]}")
            for tensor, value in kept:
                tensor.copy_(value)
        for name in found:
            if f"{path}{name}" in self.known:
                self._set(f"{path}{name}", getattr(module, name))

    def _twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.made:
            made: Any = torch.empty_like(tensor, device=self.device, requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, tensor.requires_grad)
            made.__dict__.update(tensor.__dict__)
            self.made[id(tensor)] = tensor, made
        return self.made[id(tensor)][1]

    def _reset(self, module: nn.Module, path: str) -> None:
        reset = next((found for name in _RESETS if callable(found := getattr(module, name, None))), None)
        if reset is None:
            raise LoccError(
                f"'{path}' is on the meta device, and a {type(module).__name__} has no reset_parameters() "
                "that could initialise it; give it one, or the values in weights=, or build the model within "
                "locc.deferred(), where its own code does"
            )
        reset()

    def _set(self, path: str, tensor: Tensor) -> None:
        value = self.known[path]
        if tensor.shape != value.shape:
            raise LoccError(
                f"weights={self.source!r} holds '{path}' of shape {list(value.shape)}, which in the model is "
                f"{list(tensor.shape)}"
            )
        tensor.copy_(value)


def _own(module: nn.Module) -> dict[str, Tensor]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of all in a folder, where they lie."""
    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not shards:
        raise LoccError(f"weights={str(path)!r} is a folder without .safetensors files; name another")
    found: dict[str, Tensor] = {}
    for shard in shards:
        try:
            found |= read(shard)[0].lying
        except (OSError, ValueError, SafetensorError) as error:
            raise LoccError(f"weights={str(path)!r}: '{shard}' cannot be read: {error}") from error
    return found
