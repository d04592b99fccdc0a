"""First check: reachability on the graph. Runs nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from locc.facts.names import Names, spell_node
from locc.ir import ops
from locc.ir.captured import owned_tensor, strip
from locc.ir.graph import TrainingGraph
from locc.ir.view import DATA, node_parameters
from locc.proof.findings import REACHABILITY, Finding

_CUT = "cut the edge with ir.stop_gradient(owner, value), or give the objective to the module that it trains"


def check(ir: TrainingGraph) -> list[Finding]:
    """Return every violation of locality that the graph shows.

    Each objective's differentiable ancestors, cut only at `stop_gradient` and `gradient`, must hold no
    node and no parameter of another owner; each edge between owners must be cut; each gradient must be
    taken within one owner, of a leaf; each parameter must have one owner, and no two owners'
    parameters may share memory; `assign` must set a state of its own owner.
    """
    names = Names.of(ir)
    return [
        finding
        for rule in (_objectives, _edges, _gradients, _owners, _assigns)
        for finding in rule(ir, names)
    ]


def reached(ir: TrainingGraph) -> dict[str, list[str]]:
    """Return the parameters among each objective's differentiable ancestors, by the objective's name."""
    return {
        str(objective.meta["objective"]): sorted(
            {
                strip(path)
                for node in _tape(objective)
                for path, p in node_parameters(ir.root, node)
                if p.requires_grad
            }
        )
        for objective in ir.objectives()
    }


def _tape(objective: fx.Node) -> dict[fx.Node, fx.Node | None]:
    """Return the differentiable ancestors, each with the node through which it was reached first."""
    found: dict[fx.Node, fx.Node | None] = {objective: None}
    todo = deque([objective])
    while todo:
        node = todo.popleft()
        if node.target is ops.stop_gradient or node.target is ops.gradient:
            continue
        for source in node.all_input_nodes:
            if source not in found:
                found[source] = node
                todo.append(source)
    return found


def _path(tape: dict[fx.Node, fx.Node | None], node: fx.Node) -> tuple[str, ...]:
    chain: list[str] = []
    step: fx.Node | None = node
    while step is not None:
        chain.append(spell_node(step))
        step = tape[step]
    chain.reverse()
    return (*chain[:3], "...", *chain[-4:]) if len(chain) > 8 else tuple(chain)


def _objectives(ir: TrainingGraph, names: Names) -> Iterator[Finding]:
    for objective in ir.objectives():
        owner, label = objective.meta["owner"], str(objective.meta.get("objective", objective.name))
        tape = _tape(objective)
        named = False
        foreign = []
        for node in tape:
            if node.target in (ops.stop_gradient, ops.gradient) or node.meta.get("owner") == owner:
                continue
            if node.meta.get("owner") != DATA:
                foreign.append(node)
            for path, parameter in node_parameters(ir.root, node):
                if parameter.requires_grad:
                    named = True
                    yield Finding(
                        REACHABILITY,
                        f"objective '{label}' of '{owner}' reaches parameter '{strip(path)}', "
                        f"which '{node.meta.get('owner')}' owns",
                        _path(tape, node),
                        label,
                        strip(path),
                        _CUT,
                    )
        if foreign and not named:
            node = foreign[0]
            yield Finding(
                REACHABILITY,
                f"objective '{label}' of '{owner}' reaches the live value '{node.name}' of "
                f"'{node.meta.get('owner')}'",
                _path(tape, node),
                label,
                node.name,
                _CUT,
            )


def _edges(ir: TrainingGraph, names: Names) -> Iterator[Finding]:
    for node in ir.graph.nodes:
        if node.op == "output" or node.target is ops.stop_gradient:
            continue
        for source in node.all_input_nodes:
            owner, other = node.meta.get("owner"), source.meta.get("owner")
            if other in (owner, DATA) or source.target is ops.gradient:
                continue
            yield Finding(
                REACHABILITY,
                f"'{node.name}' of '{owner}' reads the live value '{source.name}' of '{other}'",
                (spell_node(node), spell_node(source)),
                None,
                source.name,
                _CUT,
            )


def _gradients(ir: TrainingGraph, names: Names) -> Iterator[Finding]:
    for node in ir.gradients():
        scalar, wrt = node.args
        if not isinstance(scalar, fx.Node) or not isinstance(wrt, fx.Node):
            yield Finding(
                REACHABILITY, f"gradient '{node.name}' is not taken of a node with respect to a node"
            )
            continue
        owner = scalar.meta.get("owner")
        if wrt.meta.get("owner") not in (owner, DATA) or node.meta.get("owner") != owner:
            yield Finding(
                REACHABILITY,
                f"gradient '{node.name}' mixes modules: '{scalar.name}' of '{owner}' with respect to "
                f"'{wrt.name}' of '{wrt.meta.get('owner')}'",
                (spell_node(node), spell_node(scalar), spell_node(wrt)),
                node.name,
                wrt.name,
                "take the gradient with respect to the scalar's own boundary input",
            )


def _owners(ir: TrainingGraph, names: Names) -> Iterator[Finding]:
    for item in names.parameters.values():
        if len(item.owners) > 1 and item.tensor.requires_grad:
            users = ", ".join(f"'{o}'" for o in item.owners)
            yield Finding(
                REACHABILITY,
                f"parameter '{item.path}' has {len(item.owners)} owners: {users}",
                (),
                None,
                item.path,
                "compile with tied='owner' or tied='copy', or choose splits that keep its users together",
            )
    owned = [(item.path, item.owners, item.tensor) for item in names.parameters.values() if item.owners]
    for one, other in overlapping([(p, t) for p, _, t in owned]):
        first = next(o for p, o, _ in owned if p == one)
        second = next(o for p, o, _ in owned if p == other)
        if set(first) != set(second):
            yield Finding(
                REACHABILITY,
                f"parameter '{other}' of '{second[0]}' shares memory with parameter '{one}' of '{first[0]}'",
                (),
                None,
                other,
                "give each module memory of its own (clone the view), or keep both in one module",
            )


def overlapping(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Yield the names of each two tensors that have an element in common."""
    spans: list[tuple[int, int, str, Tensor]] = []
    for name, tensor in tensors:
        if tensor.numel() and tensor.device.type != "meta":
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            spans.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size(), name, tensor))
    spans.sort(key=lambda span: span[:2])
    active: list[tuple[int, int, str, Tensor]] = []
    for span in spans:
        active = [other for other in active if other[1] > span[0]]
        for other in active:
            if other[3].device == span[3].device and _share(other[3], span[3]):
                yield other[2], span[2]
        active.append(span)


def _share(one: Tensor, other: Tensor) -> bool:
    if one.is_contiguous() and other.is_contiguous():
        return True
    return bool(torch.isin(_addresses(one), _addresses(other)).any())


def _addresses(tensor: Tensor) -> Tensor:
    """Return the address of each element; exact where views of one storage interleave."""
    found = torch.tensor([tensor.data_ptr()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + torch.arange(size)[None, :] * (stride * tensor.element_size())).flatten()
    return found


def _assigns(ir: TrainingGraph, names: Names) -> Iterator[Finding]:
    for node in ir.graph.nodes:
        if node.target is not ops.assign:
            continue
        state = node.args[0]
        owner = node.meta.get("owner")
        shown = (
            strip(str(state.target)) if isinstance(state, fx.Node) and state.op == "get_attr" else str(state)
        )
        if isinstance(state, fx.Node) and state.op == "get_attr" and state.meta.get("owner") == owner:
            others = [o for o in _users(ir, names, state) if o != owner]
            if not others:
                continue
            why = f"'{others[0]}' uses as well"
        else:
            why = "is no state of its own"
        yield Finding(
            REACHABILITY,
            f"'{owner}' assigns '{shown}', which {why}",
            (spell_node(node),),
            node.name,
            shown,
            "assign to a parameter or buffer of the same module",
        )


def _users(ir: TrainingGraph, names: Names, state: fx.Node) -> tuple[str, ...]:
    """Return the owners whose nodes use what a `get_attr` reads, under whatever path."""
    tensor = owned_tensor(ir.root, str(state.target))
    found = names.parameters.get(id(tensor)) or names.buffers.get(id(tensor))
    return found.owners if found is not None else ()


def untrained(ir: TrainingGraph, trained: set[str]) -> list[str]:
    """Return the trainable parameters of the user's model that are not in `trained`."""
    return [
        strip(path)
        for path, p in ir.root.named_parameters()
        if p.requires_grad and strip(path) not in trained and isinstance(p, nn.Parameter)
    ]
