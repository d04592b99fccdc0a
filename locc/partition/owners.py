"""Which module of the partition each node of a captured forward belongs to."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from locc.errors import SplitError, nearest
from locc.ir import ops
from locc.ir.captured import strip
from locc.ir.spec import TensorSpec
from locc.ir.view import node_parameters
from locc.markers import split as marker
from locc.partition.splits import Cut


def assign(
    root: nn.Module, graph: fx.Graph, cuts: Sequence[Cut], free: set[fx.Node]
) -> tuple[dict[fx.Node, int], list[Cut]]:
    """Return each node's module index, and the cuts in forward order.

    A cut falls after the last node of its submodule (of a container that is not called itself, after the
    last of its children that is), and everything up to it belongs to the modules before it. What is computed
    beside the split submodules (a shortcut) belongs to the module that reads it first, wherever the forward
    computes it. Where fewer values cross a little later, before anything with parameters runs (after the
    addition that ends a residual block), the cut falls there. Where submodules take turns (recurrent cells in
    a loop over time), each split submodule is a module of its own, and what lies between them goes to the
    later one. Among cuts from a glob, what has no parameters joins the module before it.

    Raises:
        SplitError: a cut is unreachable, a module would be empty or have no parameters (one whose
            parameters are frozen runs and passes on its value), none has anything to train, or information
            flows back from a later module.
    """
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    # A trace may read all parameters first, so where a read stands says nothing.
    working = [n for n in nodes if n.op != "get_attr"]
    inside = {cut: [n for n in working if _belongs(n, cut)] or _contents(working, cut) for cut in cuts}
    for cut, found in inside.items():
        if not found:
            raise SplitError(_unreached(cut, nodes))
    nodes = _when_needed(nodes, {n for found in inside.values() for n in found})
    position = {node: i for i, node in enumerate(nodes)}
    ordered = sorted(cuts, key=lambda c: position[inside[c][-1]])
    if _take_turns(inside, position):
        ordered = sorted(cuts, key=lambda c: position[inside[c][0]])
        owners = _by_level(nodes, [inside[c] for c in ordered])
    else:
        ends = [_settle(root, nodes, position[inside[c][-1]], c, free) for c in ordered]
        owners = {n: sum(end < i for end in ends) for i, n in enumerate(nodes)}
        if _divides(root, owners):
            owners = _undivided(root, nodes, [inside[c] for c in ordered]) or owners
    _keep_structures_at_home(owners)
    _assign_at_home(owners)
    ordered = _join_empty(root, owners, ordered)
    _reject_empty(root, owners, ordered)
    return owners, ordered


def _when_needed(nodes: Sequence[fx.Node], fixed: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes in an order in which each stands right before its first reader, as far as it may move.

    So two forwards that differ in the order of independent statements are cut alike. The split submodules
    stay where they are, and so does what changes a value in place or reads one that is changed.
    """
    changed = {m for n in nodes for m in n.meta.get("mutates", ()) if m.op != "get_attr"}
    written = {m for n in nodes for m in n.meta.get("mutates", ())}
    place = {n: i for i, n in enumerate(nodes)}
    stays = set[fx.Node](fixed)
    for node in reversed(nodes):
        touches = "mutates" in node.meta or node in changed or any(n in written for n in node.all_input_nodes)
        if node in fixed or touches or not node.users or node.target is marker:
            stays.add(node)
        else:
            place[node] = min(place.get(user, len(nodes)) for user in node.users)
    order = {n: i for i, n in enumerate(nodes)}
    return sorted(nodes, key=lambda n: (place[n], n in stays, order[n]))


def _keep_structures_at_home(owners: dict[fx.Node, int]) -> None:
    """Give what takes a tuple or an object apart to the module that made it: only tensors can cross."""
    for node in owners:
        if node.target in (operator.getitem, getattr) and isinstance(node.args[0], fx.Node):
            whole = node.args[0]
            if whole in owners and not isinstance(whole.meta.get("spec"), TensorSpec):
                owners[node] = owners[whole]


def _assign_at_home(owners: dict[fx.Node, int]) -> None:
    """Give what sets a buffer to the module that made the value: a trace sets them all at its end."""
    for node in owners:
        value = node.args[1] if node.target is ops.assign else None
        if isinstance(value, fx.Node) and value in owners:
            owners[node] = owners[value]


def _settle(root: nn.Module, nodes: Sequence[fx.Node], end: int, cut: Cut, free: set[fx.Node]) -> int:
    """Return where a cut at position `end` falls: there, or later where fewer values cross."""
    if cut.marker:
        return end
    best, fewest = end, _crossing(nodes, end, free)
    for later in range(end + 1, len(nodes) - 1):
        if _parameters(root, nodes[later]) or nodes[later].op == "call_module":
            break
        count = _crossing(nodes, later, free)
        if count < fewest:
            best, fewest = later, count
    return best


def _parameters(root: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    """Return the parameters with which a node computes, by itself or through the reads that feed it."""
    if node.op == "get_attr":
        return []
    sources = [node, *(n for n in node.all_input_nodes if n.op == "get_attr")]
    return [p for source in sources for _, p in node_parameters(root, source)]


def _crossing(nodes: Sequence[fx.Node], end: int, free: set[fx.Node]) -> int:
    before = set(nodes[: end + 1])
    return sum(n.op != "get_attr" and n not in free and any(u not in before for u in n.users) for n in before)


def _belongs(node: fx.Node, cut: Cut) -> bool:
    if cut.marker:
        return node.target is marker and node.args[1] == cut.name
    return any(path == cut.path for path, _ in node.meta.get("stack", ()))


def _contents(nodes: Sequence[fx.Node], cut: Cut) -> list[fx.Node]:
    """Return what runs in the children of a container that is not called itself (`nn.ModuleList`)."""
    under = () if cut.marker else (f"{cut.path}.",)
    return [n for n in nodes if any(path.startswith(under) for path, _ in n.meta.get("stack", ()))]


def _unreached(cut: Cut, nodes: Sequence[fx.Node]) -> str:
    for node in nodes:
        if node.op == "call_module" and cut.path.startswith(f"{node.target}."):
            return (
                f"split '{cut.name}' lies inside '{strip(str(node.target))}', which cannot be opened "
                "here; split after that module instead"
            )
    called = [strip(path) for n in nodes for path, _ in n.meta.get("stack", ())]
    return (
        f"split '{cut.name}' is a submodule that the forward does not call; "
        f"{nearest(cut.name, dict.fromkeys(c for c in called if c != 'model'))}"
    )


def _take_turns(inside: dict[Cut, list[fx.Node]], position: dict[fx.Node, int]) -> bool:
    spans = [(position[nodes[0]], position[nodes[-1]]) for cut, nodes in inside.items() if not cut.marker]
    return any(a[0] < b[0] < a[1] < b[1] for a in spans for b in spans)


def _divides(root: nn.Module, owners: dict[fx.Node, int]) -> bool:
    """Whether two modules would use one parameter."""
    users: dict[int, set[int]] = {}
    for node, owner in owners.items():
        for parameter in _parameters(root, node):
            users.setdefault(id(parameter), set()).add(owner)
    return any(len(found) > 1 for found in users.values())


def _undivided(
    root: nn.Module, nodes: Sequence[fx.Node], inside: Sequence[list[fx.Node]]
) -> dict[fx.Node, int] | None:
    """Return owners by level where these keep every parameter in one module: one cell of a loop is split."""
    try:
        owners = _by_level(nodes, inside)
    except SplitError:
        return None
    return None if _divides(root, owners) else owners


def _by_level(nodes: Sequence[fx.Node], inside: Sequence[list[fx.Node]]) -> dict[fx.Node, int]:
    rank = {node: k for k, found in enumerate(inside) for node in found}
    level: dict[fx.Node, int] = {}
    for node in nodes:
        reached = [
            rank[n] + 1 if n in rank and rank.get(node) != rank[n] else level[n]
            for n in node.all_input_nodes
            if n in level
        ]
        level[node] = rank.get(node, max(reached, default=0))
        for source in node.all_input_nodes:
            if source in level and level[source] > level[node]:
                raise SplitError(
                    f"'{node.name}' needs '{source.name}', which a later module computes: information "
                    "flows back between these splits, so no cut separates them; split elsewhere"
                )
    return level


def _join_empty(root: nn.Module, owners: dict[fx.Node, int], cuts: Sequence[Cut]) -> list[Cut]:
    """Leave out cuts from a glob beside a module that could not train; return the others, as if named."""
    left, k = list(cuts), 0
    while k <= len(left):
        beside = [j for j in (k - 1, k) if 0 <= j < len(left) and left[j].glob]
        if not beside or all(_contained(root, owners, k)):
            k += 1
            continue
        k = beside[0]
        del left[k]
        owners.update({node: owner - 1 for node, owner in owners.items() if owner > k})
    return [replace(cut, glob=False) for cut in left]


def _contained(
    root: nn.Module, owners: dict[fx.Node, int], k: int
) -> tuple[list[fx.Node], list[nn.Parameter]]:
    """Return what a module runs, and the parameters that it uses."""
    nodes = [n for n, owner in owners.items() if owner == k and n.target is not marker]
    return [n for n in nodes if n.op != "get_attr"], [p for n in nodes for p in _parameters(root, n)]


def _reject_empty(root: nn.Module, owners: dict[fx.Node, int], cuts: Sequence[Cut]) -> None:
    names = [cut.name for cut in cuts]
    trains = False
    for k in range(len(names) + 1):
        work, held = _contained(root, owners, k)
        trains = trains or any(p.requires_grad for p in held)
        if names and not (work and held):
            raise SplitError(_empty(names, k, bool(work)))
    if not trains:
        raise SplitError(
            "the model has no parameters to train: it has none, or all of them have requires_grad=False"
        )


def _empty(names: Sequence[str], k: int, has_work: bool) -> str:
    if k == len(names):
        what = "nothing" if not has_work else "nothing that has parameters to train"
        return f"split '{names[-1]}' lies after the output: {what} follows it; leave it out"
    where = f"between splits '{names[k - 1]}' and '{names[k]}'" if k else f"before split '{names[0]}'"
    if not has_work:
        return f"the module {where} is empty: both cuts fall on the same place; leave one out"
    return f"the module {where} has no parameters; leave one of the splits out"
