"""Nested values as flat lists: tuples, lists, dicts, named tuples, dataclasses and HuggingFace outputs."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Step = tuple[str, Any]
"""One step into a container: ("item", key) or ("attr", name)."""

Path = tuple[Step, ...]


@dataclass(frozen=True)
class Structure:
    """The shape of a nested value; `branches` is None for a leaf."""

    kind: type | None = None
    steps: tuple[Step, ...] = ()
    branches: tuple[Structure, ...] | None = None
    make: Callable[[list[Any]], Any] | None = dataclasses.field(default=None, compare=False)

    def build(self, values: list[Any]) -> Any:
        """Return the nested value whose leaves are `values`, in the order of `flatten`."""
        return self._build(iter(values))

    def _build(self, values: Iterator[Any]) -> Any:
        if self.branches is None or self.make is None:
            return next(values)
        return self.make([branch._build(values) for branch in self.branches])

    def paths(self, prefix: Path = ()) -> list[Path]:
        """Return the path of every leaf, in the order of `flatten`."""
        if self.branches is None:
            return [prefix]
        found: list[Path] = []
        for step, branch in zip(self.steps, self.branches, strict=True):
            found += branch.paths((*prefix, step))
        return found


LEAF = Structure()


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """Return the leaves of a nested value, and its structure."""
    opened = _open(value)
    if opened is None:
        return [value], LEAF
    steps, values, make = opened
    leaves: list[Any] = []
    branches: list[Structure] = []
    for child in values:
        below, branch = flatten(child)
        leaves += below
        branches.append(branch)
    return leaves, Structure(type(value), steps, tuple(branches), make)


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves of a nested value."""
    return flatten(value)[0]


def spell(path: Path, name: str = "") -> str:
    """Return a path as the user would write it: `hidden[1].logits`."""
    text = name
    for kind, key in path:
        if kind == "attr" or (isinstance(key, str) and key.isidentifier()):
            text += f".{key}" if text else str(key)
        else:
            text += f"[{key!r}]"
    return text


def map_plain(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply `function` inside tuples, lists, dicts and slices."""
    if isinstance(value, slice):
        return slice(*(function(v) for v in (value.start, value.stop, value.step)))
    if type(value) in (tuple, list):
        return type(value)(map_plain(v, function) for v in value)
    if type(value) is dict:
        return {k: map_plain(v, function) for k, v in value.items()}
    return function(value)


_Opened = tuple[tuple[Step, ...], list[Any], Callable[[list[Any]], Any]]


def _open(value: Any) -> _Opened | None:
    kind = type(value)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return tuple(("attr", f) for f in kind._fields), list(value), lambda new: kind(*new)
    if isinstance(value, (tuple, list)):
        return tuple(("item", i) for i in range(len(value))), list(value), lambda new: kind(new)
    if isinstance(value, Mapping):
        return _open_mapping(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _open_dataclass(value)
    return None


def _open_mapping(value: Mapping[Any, Any]) -> _Opened:
    kind: Any = type(value)
    keys = list(value)
    if dataclasses.is_dataclass(value):  # HuggingFace's ModelOutput is both
        steps = tuple(("attr", key) for key in keys)
        return steps, [value[k] for k in keys], lambda new: kind(**dict(zip(keys, new, strict=True)))

    def make(new: list[Any]) -> Any:
        pairs = zip(keys, new, strict=True)
        if kind in (dict, OrderedDict):
            return kind(pairs)
        made = copy.copy(template)
        made.update(pairs)
        return made

    template: Any = None if kind in (dict, OrderedDict) else copy.copy(value)
    if template is not None:
        template.update(dict.fromkeys(keys))
    return tuple(("item", key) for key in keys), [value[k] for k in keys], make


def _open_dataclass(value: Any) -> _Opened:
    names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
    template = copy.copy(value)
    for name in names:
        object.__setattr__(template, name, None)

    def make(new: list[Any]) -> Any:
        made = copy.copy(template)
        for name, part in zip(names, new, strict=True):
            object.__setattr__(made, name, part)  # no __init__: it may compute, and the class may be frozen
        return made

    return tuple(("attr", name) for name in names), [getattr(value, n) for n in names], make
