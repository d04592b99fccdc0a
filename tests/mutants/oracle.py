"""What a training graph really does: a small interpreter in plain PyTorch, and who owns what it moves.

Shares nothing with `locc.proof` and `locc.lower`. Each objective is differentiated with respect to every
parameter there is, in float64, at several random points: parameters are moved off their initial values,
so that a network that starts at zero hides nothing.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from locc.ir import TrainingGraph, carry, ops
from locc.ir.state import begin

from .order import ordered

SEEDS = (0, 1, 2)


class Truth(StrEnum):
    """What a mutant really is."""

    LEAK = "leak"
    CHANGED = "changed"
    SAME = "same"


@dataclass(frozen=True)
class Move:
    """Something that changes a tensor: `by` whom, and the path of the tensor under the root."""

    by: str
    path: str
    how: str


@dataclass
class Seen:
    """What one run showed.

    Attributes:
        gradients: (owner of the objective, parameter's path) -> the gradient, summed over objectives.
        assigned: (owner of the assignment, path) -> the value.
    """

    gradients: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    assigned: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def training(self) -> dict[str, Tensor]:
        """Return the gradient that each parameter is trained with, summed over owners."""
        total: dict[str, Tensor] = {}
        for (_, path), gradient in self.gradients.items():
            total[path] = total[path] + gradient if path in total else gradient
        return total


@dataclass(frozen=True)
class Holding:
    """What an owner moves outside autograd: its optimizer's tensors, and those it clips and clears."""

    optimizer: Sequence[Tensor]
    cleared: Sequence[Tensor]


def run(
    ir: TrainingGraph,
    tensors: Sequence[Tensor],
    target: Any,
    seed: int,
    *,
    draw: bool = True,
    dtype: Any = torch.float64,
) -> Seen:
    """Run a training step once.

    Args:
        ir: the graph; neither it nor its model is changed.
        tensors: the model's inputs, in placeholder order.
        target: the target.
        seed: of the random point; each node draws its random numbers from a stream of its own name.
        draw: whether to move parameters and inputs to a random point.
        dtype: the floating-point type to compute in.
    """
    root = copy.deepcopy(ir.root).to(dtype).train()
    begin(root, len(tensors[0]))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        if draw:
            _move_off(root, seed)
        return _Interpreter(ir, root, seed).step(
            [_drawn(t, seed, dtype, draw) for t in tensors], _cast(target, dtype)
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def _drawn(tensor: Tensor, seed: int, dtype: torch.dtype, draw: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.clone()
    torch.default_generator.manual_seed(_number(seed, "input", 0))
    return torch.randn(tensor.shape, dtype=dtype) if draw else tensor.to(dtype, copy=True)


def _move_off(root: nn.Module, seed: int) -> None:
    for path, parameter in root.named_parameters():
        torch.default_generator.manual_seed(_number(seed, path, 0))
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))


def _number(seed: int, name: str, turn: int) -> int:
    return zlib.crc32(f"{seed}/{name}/{turn}".encode())


class _Interpreter:
    def __init__(self, ir: TrainingGraph, root: nn.Module, seed: int) -> None:
        self.ir, self.root, self.seed = ir, root, seed
        self.values: dict[fx.Node, Any] = {}
        self.paths = {id(p): path for path, p in root.named_parameters()}
        self.parameters = [p for p in root.parameters() if p.requires_grad]
        self.leaves = {n.args[1] for n in ir.graph.nodes if n.target is ops.gradient}
        self.seen = Seen()

    def step(self, tensors: Sequence[Tensor], target: Any) -> Seen:
        given = dict(zip((*self.ir.inputs, self.ir.target), (*tensors, target), strict=True))
        for unit in ordered(self.ir.graph.nodes, _unit):
            region = self.ir.repeats.get(unit[0].meta.get("repeat", ""))
            for turn in range(region.times if region else 1):
                carried = dict(region.carried) if region and turn else {}
                held = {entry: self.values[end] for entry, end in carried.items()}
                for node in unit:
                    self.values[node] = (
                        held[node]
                        if node in held
                        else given[node]
                        if node in given
                        else self.value(node, turn)
                    )
        return self.seen

    def value(self, node: fx.Node, turn: int) -> Any:
        args: Any = fx.map_arg(node.args, self.values.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, self.values.__getitem__)
        if node.op == "output":
            return None
        if node.op == "get_attr":
            return _at(self.root, str(node.target))
        if node.target is ops.stop_gradient:
            cut = args[0].detach()
            return cut.requires_grad_() if node in self.leaves and cut.is_floating_point() else cut
        if node.target is ops.gradient:
            return _derivative(*args)
        if node.target is ops.objective:
            return self.objective(str(node.meta["owner"]), args[0])
        if node.target is ops.assign:
            return self.assign(str(node.meta["owner"]), node.args[0], *args)
        if node.target is carry:
            return args[0]
        torch.default_generator.manual_seed(_number(self.seed, node.name, turn))
        if node.op == "call_module":
            return _at(self.root, str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def objective(self, owner: str, scalar: Tensor) -> Tensor:
        if scalar.requires_grad:
            found = torch.autograd.grad(scalar, self.parameters, retain_graph=True, allow_unused=True)
            for parameter, gradient in zip(self.parameters, found, strict=True):
                key = owner, self.paths[id(parameter)]
                if gradient is not None:
                    before = self.seen.gradients.get(key)
                    self.seen.gradients[key] = gradient if before is None else before + gradient
        return scalar

    def assign(self, owner: str, state: Any, held: Tensor, value: Tensor) -> Tensor:
        """Record what would be set; the value that later nodes read stays the old one, as in a step."""
        self.seen.assigned[owner, str(state.target)] = value.detach().clone()
        return held


def _unit(node: fx.Node) -> Any:
    return node.meta.get("repeat") or node


def _derivative(scalar: Tensor, wrt: Tensor) -> Tensor:
    if not scalar.requires_grad or not wrt.requires_grad:
        return torch.zeros_like(wrt)
    (found,) = torch.autograd.grad(scalar, wrt, retain_graph=True, allow_unused=True)
    return torch.zeros_like(wrt) if found is None else found


def _at(root: nn.Module, path: str) -> Any:
    found: Any = root
    for atom in path.split("."):
        found = getattr(found, atom)
    return found


# ---- who owns what ---------------------------------------------------------------------------


def holders(ir: TrainingGraph) -> dict[int, set[str]]:
    """Return, for each parameter and buffer by id, the owners whose nodes compute with it."""
    found: dict[int, set[str]] = {}
    for node in ir.graph.nodes:
        only_set = bool(node.users) and all(u.target is ops.assign and u.args[0] is node for u in node.users)
        if node.op in ("call_module", "get_attr") and not only_set:
            for tensor in _used(_at(ir.root, str(node.target)), node):
                found.setdefault(id(tensor), set()).add(str(node.meta.get("owner")))
    return found


def _used(held: Any, node: fx.Node) -> list[Tensor]:
    if isinstance(held, Tensor):
        return [held]
    replaced = [set(u.args[1]) for u in node.users if u.target is ops.call_with and u.args[0] is node]  # type: ignore[arg-type]
    gone = set.intersection(*replaced) if replaced and len(replaced) == len(node.users) else set()
    tensors = (*held.named_parameters(), *held.named_buffers())
    return [tensor for name, tensor in tensors if name not in gone]


def foreign_moves(ir: TrainingGraph, runs: Sequence[Seen], holdings: Mapping[str, Holding]) -> list[Move]:
    """Return everything that one owner does to a tensor of another."""
    owners = holders(ir)
    tensors = {**dict(ir.root.named_parameters()), **dict(ir.root.named_buffers())}

    def others(path: str, owner: str) -> set[str]:
        return owners.get(id(tensors.get(path)), set()) - {owner}

    found: dict[Move, None] = {}
    for seen in runs:
        for (owner, path), gradient in seen.gradients.items():
            if bool((gradient != 0).any()) and (
                others(path, owner) or owner not in owners.get(id(tensors[path]), {owner})
            ):
                found[Move(owner, path, "gradient")] = None
        for owner, path in seen.assigned:
            if others(path, owner):
                found[Move(owner, path, "assignment")] = None
    found.update(dict.fromkeys(_held_abroad(ir, owners, holdings)))
    found.update(dict.fromkeys(_shared_memory(tensors, owners)))
    return list(found)


def _held_abroad(
    ir: TrainingGraph, owners: Mapping[int, set[str]], holdings: Mapping[str, Holding]
) -> Iterator[Move]:
    named = dict(ir.root.named_parameters())
    paths = {id(p): path for path, p in named.items()}
    for owner, holding in holdings.items():
        for how, held in (("optimizer", holding.optimizer), ("clipping and clearing", holding.cleared)):
            for tensor in held:
                if id(tensor) not in paths:  # nobody's own, or a view: what it moves has the name
                    moved = [path for path, p in named.items() if _moves(tensor, p)]
                    yield from (
                        Move(owner, path, how) for path in moved or [f"a tensor {list(tensor.shape)}"]
                    )
                elif owners.get(id(tensor), set()) != {owner}:
                    yield Move(owner, paths[id(tensor)], how)


def _shared_memory(tensors: Mapping[str, Tensor], owners: Mapping[int, set[str]]) -> Iterator[Move]:
    """Move each trained parameter that shares a storage, and look which other tensor moves with it."""
    storages: dict[int, list[str]] = {}
    for path, tensor in tensors.items():
        if tensor.numel():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(path)
    for paths in storages.values():
        for one in paths if len(paths) > 1 else ():
            for other in paths:
                apart = owners.get(id(tensors[one]), set()) != owners.get(id(tensors[other]), set())
                if (
                    one != other
                    and apart
                    and tensors[one].requires_grad
                    and _moves(tensors[one], tensors[other])
                ):
                    yield Move("/".join(sorted(owners.get(id(tensors[one]), {"?"}))), other, "shared memory")


def _moves(one: Tensor, other: Tensor) -> bool:
    before, watched = one.detach().clone(), other.detach().clone()
    with torch.no_grad():
        one.detach().add_(1)
        moved = not torch.equal(other.detach(), watched)
        one.detach().copy_(before)
    return moved


# ---- the verdict -----------------------------------------------------------------------------


def classify(clean: Sequence[Seen], mutant: Sequence[Seen]) -> Truth:
    """Say whether a mutant that leaks nothing trains as the clean program does, at the same points."""
    return Truth.SAME if all(map(_alike, clean, mutant)) else Truth.CHANGED


def _alike(one: Seen, other: Seen) -> bool:
    a, b = one.training(), other.training()
    zero = {path: torch.zeros_like(gradient) for path, gradient in (a | b).items()}
    return one.assigned.keys() == other.assigned.keys() and all(
        _equal(x, y)
        for x, y in [
            *((a.get(path, zero[path]), b.get(path, zero[path])) for path in zero),
            *((value, other.assigned[key]) for key, value in one.assigned.items()),
        ]
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    size = max(float(one.abs().max()), float(other.abs().max())) if one.numel() else 0.0
    return bool(((one - other).abs() <= torch.finfo(one.dtype).eps ** 0.5 * size).all())
