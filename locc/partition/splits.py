"""What the user wrote as `splits`, as a list of cut points."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from locc.errors import SplitError, nearest
from locc.ir.captured import Inputs, Root
from locc.partition.balance import balanced_cuts


@dataclass(frozen=True)
class Cut:
    """One split point: after the submodule `name`, or at the marker `name` in a forward.

    One that a glob has found is left out where it would part nothing.
    """

    name: str
    marker: bool = False
    glob: bool = False

    @property
    def path(self) -> str:
        """Dotted path of the submodule under the root."""
        return f"model.{self.name}"


def resolve(
    root: Root, splits: int | str | Sequence[str], markers: Sequence[str], inputs: Inputs | None
) -> list[Cut]:
    """Turn `splits` and the markers found in the model's forward into cuts, in no particular order.

    Args:
        root: holds the model.
        splits: names or globs of submodules, or K for K modules of balanced cost.
        markers: names of the `locc.split` markers in the forward.
        inputs: example inputs, needed to balance.

    Raises:
        SplitError: a name matches nothing, appears twice, or K modules cannot be had.
    """
    marked = [Cut(name, marker=True) for name in markers]
    if isinstance(splits, bool) or (isinstance(splits, int) and splits < 1):
        raise SplitError(f"splits={splits!r}: give names, or the number of modules, at least 1")
    if isinstance(splits, int):
        if marked:
            raise SplitError(
                f"splits={splits} asks for balanced modules, but the forward marks its own splits "
                f"({', '.join(markers)}); give splits=[] to use the markers"
            )
        if inputs is None:
            raise SplitError(f"splits={splits} needs example_inputs: the cost of a module depends on them")
        return [Cut(name) for name in balanced_cuts(root.model, inputs, splits)]
    if not isinstance(splits, Iterable):
        raise SplitError(f"splits={splits!r}: give names or globs of submodules, or the number of modules")
    names = [splits] if isinstance(splits, str) else list(splits)
    found = _match(root.model, names, markers)
    cuts = [cut for cut in found if not cut.marker] + marked
    for cut in cuts:
        if sum(other.name == cut.name for other in cuts) > 1:
            raise SplitError(f"split '{cut.name}' is given twice")
    return cuts


def _match(model: nn.Module, names: Iterable[str], markers: Sequence[str]) -> list[Cut]:
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found: list[Cut] = []
    for name in names:
        if not isinstance(name, str):
            raise SplitError(f"splits must be names, globs or a number; found {name!r}")
        if name in markers:
            found.append(Cut(name, marker=True))
        elif name in known:
            found.append(Cut(name))
        elif any(c in name for c in "*?["):
            found.extend(Cut(match, glob=True) for match in _glob(name, known))
        else:
            raise SplitError(f"split '{name}' matches no submodule; {nearest(name, known)}")
    return found


def _glob(pattern: str, known: Sequence[str]) -> list[str]:
    depth = pattern.count(".")
    hits = [name for name in known if name.count(".") == depth and fnmatch.fnmatchcase(name, pattern)]
    if not hits:
        raise SplitError(f"split '{pattern}' matches no submodule; {nearest(pattern.strip('.*?'), known)}")
    return hits


def opened_by(paths: Iterable[str]) -> frozenset[str]:
    """Return the strict ancestors, under the root, of the submodules at `paths`."""
    found: set[str] = set()
    for path in paths:
        parts = path.split(".")
        found.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return frozenset(found)
