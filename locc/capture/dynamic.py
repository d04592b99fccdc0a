"""Which dimensions of the inputs may vary beside the batch, and at which second size each is tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from locc.capture.batch import Call, resized
from locc.capture.eager import Eager
from locc.errors import CaptureError, nearest
from locc.ir.spec import FreeDim, Point

Dynamic = str | Mapping[str, Mapping[int, str] | Sequence[int]] | None
"""None; "auto"; or for each input, by the name of its argument, the dimensions that vary and their names."""

_ROUNDS = 2  # second sizes that the captured code may refuse before a dimension counts as fixed
_NAMES = {(2, 1): "T", (3, 1): "T", (4, 2): "H", (4, 3): "W", (5, 2): "D", (5, 3): "H", (5, 4): "W"}


class FixedError(Exception):
    """The captured code decides on free dimensions."""

    def __init__(self, names: frozenset[str], text: str) -> None:
        super().__init__(text)
        self.names, self.text = names, text


@dataclass
class _Group:
    """Dimensions of the inputs that have one size in every call.

    Attributes:
        places: pairs (index of the tensor, dimension).
        other: the second size; None while none was found.
        tried: second sizes that the model or its captured code does not take.
    """

    name: str
    size: int
    places: list[tuple[int, int]]
    other: int | None = None
    tried: set[int] = field(default_factory=set)
    rounds: int = 0

    def candidates(self) -> list[int]:
        """Return second sizes to try: slices of the example first, which are data of its kind."""
        n = self.size
        sizes = [n // 2, n + n // 2, n - 1, n + 1, 2 * n]
        return [s for s in dict.fromkeys(sizes) if s > 1 and s != n and s not in self.tried]


class Choice:
    """The free dimensions: what was asked for, less what turned out to be fixed.

    Attributes:
        notes: what `dynamic="auto"` left fixed because of the model's code, and where.
    """

    def __init__(self, call: Call, dynamic: Dynamic) -> None:
        self.call, self.auto = call, dynamic == "auto"
        self.notes: list[str] = []
        if dynamic is None:
            self.groups: list[_Group] = []
        elif dynamic == "auto":
            self.groups = _grouped(call)
        elif isinstance(dynamic, Mapping):
            self.groups = _named(call, dynamic)
        else:
            raise CaptureError(f"dynamic={dynamic!r}: give 'auto', or {{input: {{dimension: name}}}}")

    def settle(self, eager: Eager) -> None:
        """Find a second size for each free dimension, and tell the call.

        Raises:
            CaptureError: the model itself takes no other size of a dimension that was named.
        """
        for group in list(self.groups):
            if group in self.groups and group.other is None and not self._alone(eager, group):
                self._drop(group, "the model itself takes no other size that was tried")
        while self.groups and not _takes(eager, self._sizes(self.groups)):
            self._join_or_drop(
                self.groups[-1], "the model takes no other size of it together with the others"
            )
        self.call.free = [{} for _ in self.call.tensors]
        for group in self.groups:
            for tensor, dim in group.places:
                self.call.free[tensor][dim] = FreeDim(group.name, group.size, group.other or group.size)

    def fix(self, names: frozenset[str], text: str) -> None:
        """Learn that the captured code decides on the dimensions of these names.

        Raises:
            CaptureError: the user named them.
        """
        group = next(g for g in reversed(self.groups) if g.name in names)
        group.rounds += 1
        if group.rounds < _ROUNDS and group.other is not None and len(names) == 1:
            group.tried.add(group.other)
            group.other = None
            return
        self._join_or_drop(group, text, alone=len(names) == 1)

    def _alone(self, eager: Eager, group: _Group) -> bool:
        for size in self._untaken(group):
            if _takes(eager, self._sizes([group], size)):
                group.other = size
                return True
        return self.auto and (other := self._like(group)) is not None and self._join(eager, group, other)

    def _untaken(self, group: _Group) -> list[int]:
        """Return second sizes by which the group differs from every other one of its size."""
        used = {g.other for g in self.groups if g.size == group.size}
        return [size for size in group.candidates() if size not in used]

    def _join(self, eager: Eager, group: _Group, other: _Group) -> bool:
        joined = _Group(group.name, group.size, [*group.places, *other.places])
        for size in self._untaken(joined):
            if _takes(eager, self._sizes([joined], size)):
                joined.other = size
                self.groups = [joined if g is group else g for g in self.groups if g is not other]
                return True
        return False

    def _like(self, group: _Group) -> _Group | None:
        """Return another group of the same size: the two may have to vary together."""
        return next((g for g in self.groups if g is not group and g.size == group.size), None)

    def _join_or_drop(self, group: _Group, text: str, alone: bool = False) -> None:
        other = self._like(group)
        if self.auto and other is not None and not alone:
            group.places += other.places
            self.groups.remove(other)
        else:
            self._drop(group, text)

    def _drop(self, group: _Group, text: str) -> None:
        places = " and ".join(f"dimension {d} of input '{self.call.names[i]}'" for i, d in group.places)
        if not self.auto:
            raise CaptureError(
                f"dynamic: '{group.name}' ({places}) cannot vary: {text}. Leave it out, or give "
                "example_inputs with another size of it"
            )
        self.groups.remove(group)
        if group.rounds:
            self.notes.append(f"{places} stays at {group.size}: {text}")

    def _sizes(self, groups: list[_Group], size: int | None = None) -> list[Tensor]:
        batch = self.call.batch
        self.call.free = [{} for _ in self.call.tensors]
        tensors = self.call.at(Point(batch if batch is None else max(batch, 2)))
        for group in groups:
            for i, dim in group.places:
                tensors[i] = resized(tensors[i], {dim: size or group.other or group.size})
        return tensors


def _takes(eager: Eager, tensors: list[Tensor]) -> bool:
    return all(eager.takes(tensors, training) for training in (True, False))


def _grouped(call: Call) -> list[_Group]:
    """Group the dimensions of all inputs by position and size."""
    found: dict[tuple[int, int], _Group] = {}
    for i, tensor in enumerate(call.tensors):
        for dim in range(1 if call.batched[i] else 0, tensor.dim()):
            size = int(tensor.shape[dim])
            if size > 1:
                group = found.setdefault((dim, size), _Group(_name(tensor, dim, found.values()), size, []))
                group.places.append((i, dim))
    return list(found.values())


def _name(tensor: Tensor, dim: int, taken: Iterable[_Group]) -> str:
    name = _NAMES.get((tensor.dim(), dim), f"N{dim}")
    used = {group.name for group in taken}
    return next(n for n in (name, *(f"{name}{i}" for i in range(2, 99))) if n not in used)


def _named(call: Call, dynamic: Mapping[str, Mapping[int, str] | Sequence[int]]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for name, dims in dynamic.items():
        if name not in call.names:
            raise CaptureError(
                f"dynamic: the model has no tensor input '{name}'; {nearest(name, call.names)}"
            )
        index = call.names.index(name)
        tensor = call.tensors[index]
        if isinstance(dims, str) or not isinstance(dims, (Mapping, Sequence)):
            raise CaptureError(
                f"dynamic: {dims!r} of input '{name}': give {{dimension: name}}, or dimensions"
            )
        named = dims if isinstance(dims, Mapping) else {d: _name(tensor, d, groups.values()) for d in dims}
        for dim, label in named.items():
            _check(call, index, dim, label)
            size = int(tensor.shape[dim])
            group = groups.setdefault(label, _Group(label, size, []))
            if group.size != size:
                raise CaptureError(
                    f"dynamic: '{label}' is {group.size} and {size} in the example inputs; one name, one size"
                )
            group.places.append((index, dim % tensor.dim()))
    return list(groups.values())


def _check(call: Call, index: int, dim: int, label: str) -> None:
    name, tensor = call.names[index], call.tensors[index]
    if not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
        raise CaptureError(
            f"dynamic: input '{name}' of shape {list(tensor.shape)} has no dimension {dim!r}; count from "
            "0, the batch"
        )
    if dim % tensor.dim() == 0 and call.batched[index]:
        raise CaptureError(f"dynamic: dimension 0 of input '{name}' is the batch, which varies anyway")
    if not isinstance(label, str) or not label.isidentifier() or label == "B":
        raise CaptureError(f"dynamic: {label!r} is no name for a dimension; use a word other than 'B'")
    if tensor.shape[dim] < 2:
        raise CaptureError(
            f"dynamic: dimension {dim} of input '{name}' is {tensor.shape[dim]} in the example; give one "
            "of at least 2, since a size of 1 is broadcast"
        )
