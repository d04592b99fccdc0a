"""Values that a module changes in place, and what that means for whoever else reads them.

A module that changes a foreign value in place works on a copy of its own. That equals the user's code
as long as nobody reads the changed storage through another value, and no other module reads it later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from locc.errors import SplitError


def check_in_place(graph: fx.Graph, indices: Mapping[fx.Node, int], names: Sequence[str]) -> None:
    """Refuse in-place changes that copies at the boundaries cannot reproduce.

    Raises:
        SplitError: names the module that changes a value, and the one that would read another value.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for changer in graph.nodes:
        if changer in indices:
            for value in changer.meta.get("mutates", ()):
                if value in indices and value.op != "get_attr":
                    _check(changer, value, position, indices, names)


def changed_by(graph: fx.Graph, value: fx.Node, index: int, indices: Mapping[fx.Node, int]) -> bool:
    """Whether module `index` changes `value`, or a view of it, in place."""
    return any(indices.get(n) == index and value in n.meta.get("mutates", ()) for n in graph.nodes)


def _check(
    changer: fx.Node,
    value: fx.Node,
    position: Mapping[fx.Node, int],
    indices: Mapping[fx.Node, int],
    names: Sequence[str],
) -> None:
    here, home = indices[changer], indices[value]
    for reader in value.users:
        there = indices.get(reader, len(names) - 1)
        later = position[reader] > position[changer]
        if there != here and later == (home != here):
            when = "afterwards" if later else "before that"
            raise SplitError(
                f"module '{names[here]}' changes '{value.name}' in place and module '{names[there]}' reads"
                f" it {when}; use an out-of-place operation there"
            )
        if there == here != home and later and not _only_way(changer, value, indices):
            raise SplitError(
                f"module '{names[here]}' changes '{value.name}' in place through another value that shares"
                " its storage, and both come from an earlier module; use an out-of-place operation there"
            )


def _only_way(changer: fx.Node, value: fx.Node, indices: Mapping[fx.Node, int]) -> bool:
    """Whether the change reaches `value` through the copy that the module makes of it, and no other's."""
    here = indices[changer]
    entries: set[fx.Node] = set()
    todo, seen = [changer], {changer}
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in changer.meta["mutates"] and indices.get(source, here) != here:
                entries.add(source)
            elif source not in seen and indices.get(source) == here:
                seen.add(source)
                todo.append(source)
    return entries == {value}
