"""Which dimensions of the inputs are the batch or free, and the same inputs at other sizes of them."""

from __future__ import annotations

import inspect
import reprlib
from typing import Any

import torch
from torch import Tensor, nn

from locc.capture.tree import Path, flatten, spell
from locc.errors import CaptureError
from locc.ir.captured import Inputs
from locc.ir.spec import FreeDim, Point, TensorSpec


class Call:
    """The example call: its tensors, their names, and how to make the call at other sizes.

    Attributes:
        batched: which tensors have the batch as their first dimension.
        free: the free dimensions of each tensor, by index.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.leaves, self.structure = flatten((inputs.args, inputs.kwargs))
        self.where = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self.leaves[i] for i in self.where]
        if not self.tensors:
            raise CaptureError(
                "the example inputs hold no tensor; pass the model's inputs as the loader yields them"
            )
        paths = self.structure.paths()
        self.constants = _without_cache(model, inputs)
        names = _argument_names(model, inputs)
        self.names = tuple(_name(paths[i], names) for i in self.where)
        first = self.tensors[0]
        self.batch: int | None = int(first.shape[0]) if first.dim() else None
        self.batched = [t.dim() > 0 and int(t.shape[0]) == self.batch for t in self.tensors]
        self.free: list[dict[int, FreeDim]] = [{} for _ in self.tensors]

    @property
    def notes(self) -> list[str]:
        """What the user did not ask for in so many words."""
        return [
            f"captured with {name}={value}: training keeps no cache" for name, value in self.constants.items()
        ]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The specs of the tensors."""
        found = []
        for t, batched, free in zip(self.tensors, self.batched, self.free, strict=True):
            spec = TensorSpec.of(t, self.batch if batched else None)
            found.append(TensorSpec(tuple(free.get(i, d) for i, d in enumerate(spec.shape)), t.dtype))
        return tuple(found)

    @property
    def dims(self) -> list[FreeDim]:
        """The free dimensions, each once."""
        return list({dim.name: dim for free in self.free for dim in free.values()}.values())

    def text(self, point: Point) -> str:
        """Return sizes in words."""
        others = [f"{dim.name} = {dim.other}" for dim in self.dims] if point.probe else []
        return " and ".join([f"a batch of {point.batch}", *others])

    def at(self, point: Point) -> list[Tensor]:
        """Return copies of the tensors at other sizes: repeated or sliced."""
        found = []
        for tensor, batched, free in zip(self.tensors, self.batched, self.free, strict=True):
            wanted = {i: dim.other for i, dim in free.items()} if point.probe else {}
            if batched and point.batch is not None:
                wanted[0] = point.batch
            found.append(resized(tensor, wanted))
        return found

    def inputs(self, tensors: list[Tensor]) -> Inputs:
        """Return the call with other tensors in the place of the example's."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.where, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = self.structure.build(leaves)
        return Inputs(args, {**kwargs, **self.constants})

    def flatten(self, inputs: Inputs) -> list[Tensor]:
        """Return the tensors of a call of the same form.

        Raises:
            ValueError: the call has another structure, or other constants.
        """
        leaves, structure = flatten((inputs.args, inputs.kwargs))
        if structure != self.structure:
            args, kwargs = self.structure.build(list(self.leaves))
            raise ValueError(
                "the arguments are nested differently: "
                + (
                    _other_arguments(inputs, args, kwargs)
                    or f"{_count(leaves)} instead of {_count(self.leaves)}"
                )
            )
        tensors: list[Tensor] = []
        for i, (leaf, old) in enumerate(zip(leaves, self.leaves, strict=True)):
            if isinstance(leaf, Tensor) and isinstance(old, Tensor):
                tensors.append(leaf)
            elif isinstance(leaf, Tensor) or isinstance(old, Tensor) or not _equal(leaf, old):
                name = spell(self.structure.paths()[i][1:])
                raise ValueError(f"argument '{name}' was {_show(old)} and now is {_show(leaf)}")
        return tensors


def _without_cache(model: nn.Module, inputs: Inputs) -> dict[str, bool]:
    """Return the keyword that switches off a key-value cache (Hugging Face), where the model would keep one.

    Training has no use for it. Where the call says `use_cache` itself, that holds.
    """
    base = getattr(model, "get_base_model", lambda: model)()  # peft hands on keywords that it does not know
    parameters = inspect.signature(base.forward).parameters
    position = list(parameters).index("use_cache") if "use_cache" in parameters else None
    # some causal models (GraniteMoe) name the cache, and hand `use_cache` on among the rest
    handed = "past_key_values" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = "use_cache" in inputs.kwargs or (position is not None and position < len(inputs.args))
    caches = getattr(getattr(model, "config", None), "use_cache", False) is True
    takes = position is not None or handed
    return {"use_cache": False} if caches and takes and not given else {}


def _other_arguments(inputs: Inputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    missing = [repr(name) for name in kwargs if name not in inputs.kwargs]
    added = [repr(name) for name in inputs.kwargs if name not in kwargs]
    parts = [f"{', '.join(missing)} is missing"] if missing else []
    parts += [f"{', '.join(added)} is new"] if added else []
    if len(inputs.args) != len(args):
        parts.append(f"there are {len(inputs.args)} positional arguments instead of {len(args)}")
    return "; ".join(parts)


def resized(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    """Return a copy of other sizes in some dimensions: sliced, or repeated from the start."""
    result = tensor.detach()
    for dim, size in sizes.items():
        if size != result.shape[dim]:
            index = torch.arange(size, device=tensor.device) % result.shape[dim]
            result = result.index_select(dim, index)
    return result.clone() if result.data_ptr() == tensor.data_ptr() else result


def _argument_names(model: nn.Module, inputs: Inputs) -> list[str]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = []
    for i in range(len(inputs.args)):
        known = i < len(parameters) and parameters[i].kind is not inspect.Parameter.VAR_POSITIONAL
        names.append(parameters[i].name if known else f"input{i}")
    return names


def _name(path: Path, names: list[str]) -> str:
    (_, side), (_, key), *rest = path
    return spell(tuple(rest), names[key] if side == 0 else str(key))


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:
        return False


def _show(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else reprlib.repr(value)


def _count(leaves: list[Any]) -> str:
    tensors = sum(isinstance(leaf, Tensor) for leaf in leaves)
    return f"{tensors} tensors among {len(leaves)} values"
