"""A valid order of nodes that is as close to the written one as it can be."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable

from torch import fx


class CycleError(Exception):
    """The nodes depend on each other in a circle: no program."""


def ordered(nodes: Iterable[fx.Node], unit: Callable[[fx.Node], Hashable]) -> list[list[fx.Node]]:
    """Return the nodes unit by unit, each after everything that it reads.

    Raises:
        CycleError: there is no such order.
    """
    members: dict[Hashable, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(unit(node), []).append(node)
    place = {key: i for i, key in enumerate(members)}
    needs = {
        key: {unit(s) for node in held for s in node.all_input_nodes} - {key} for key, held in members.items()
    }
    feeds: dict[Hashable, list[Hashable]] = {}
    for key, sources in needs.items():
        for source in sources:
            feeds.setdefault(source, []).append(key)
    keys = list(members)
    ready = [place[key] for key, sources in needs.items() if not sources]
    heapq.heapify(ready)
    result = []
    while ready:
        key = keys[heapq.heappop(ready)]
        result.append(members[key])
        for user in feeds.get(key, []):
            needs[user].discard(key)
            if not needs[user]:
                heapq.heappush(ready, place[user])
    if len(result) < len(members):
        raise CycleError
    return result
