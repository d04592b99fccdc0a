"""What a node of the graph computes, found by trying it on a few samples."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from locc.errors import MethodError
from locc.ir.calls import given as arguments
from locc.ir.calls import is_size, size_of
from locc.ir.captured import owned_tensor
from locc.ir.likeness import likeness
from locc.ir.memory import memories
from locc.ir.spec import SMALL, BatchDim, FreeDim, Point, Spec, TensorSpec, fit, map_specs

_BATCHES = (6, 8, 11)
_CONTRACTION = re.compile(
    r"(.*mm|mv|addmv|.*dot|_trilinear|.*convolution.*|.*cholesky.*|.*triangular_solve|lu_.*|.*attention.*"
    r"|.*(rnn|lstm|gru).*|_?linalg_(?!vector_norm|cross|diagonal).*)"
)
_NEEDS_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class Inferred:
    """What a node yields.

    Attributes:
        spec: shape and dtype of its value.
        random: whether it draws random numbers.
        contracts: whether it multiplies or solves matrices.
        views: whether its value lies in the memory of what it reads.
    """

    spec: Spec
    random: bool
    contracts: bool
    views: bool


def infer(
    root: nn.Module, op: str, target: Any, args: Any, kwargs: Any, known: dict[Hashable, Inferred | None]
) -> Inferred | None:
    """Try an operation at several sizes of what may vary; nothing under the root changes.

    Args:
        root: holds the modules and tensors.
        op: the kind of node, as in `torch.fx`.
        target: the node's.
        args: the node's.
        kwargs: the node's.
        known: what has been tried before; the result is added.

    Returns:
        What it yields, or None where that cannot be known: an input without a spec (the target), code whose
        result depends on data, or a shape that does not grow evenly with the batch.
    """
    inputs = _read(args, kwargs)
    held = {n: owned_tensor(root, str(n.target)) for n in inputs if n.op == "get_attr"}
    modules = {n: h for n, h in held.items() if isinstance(h, nn.Module)}
    if any(n.meta.get("spec") is None for n in inputs if n not in modules):
        return None
    if op == "call_module":
        target = root.get_submodule(str(target))
    trial = _Trial(op, target, args, kwargs, inputs, modules)
    try:
        key = (op, *(likeness(v, modules) for v in (target, args, kwargs)))
        if key in known:
            return known[key]
    except TypeError:  # an argument that cannot be hashed
        return _tried(trial)
    known[key] = _tried(trial)
    return known[key]


def _read(*args: Any) -> list[fx.Node]:
    """Return the values that arguments are computed from: themselves, or what their sizes are of."""
    found: list[fx.Node] = []
    fx.map_arg(args, found.append)
    return [source for n in found for source in (_read(n.all_input_nodes) if is_size(n) else [n])]


def _tried(trial: _Trial) -> Inferred | None:
    for fake in (False, True):
        if fake or trial.elements() <= SMALL:
            try:
                return trial.result(fake)
            except VariesError:
                raise
            except Exception:  # whatever it raises, it cannot be run so
                continue
    return None


class VariesError(MethodError):
    """What a method adds does not take the sizes that `dynamic` lets in."""


class _UnknownError(Exception):
    pass


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random = self.contracts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = func is torch.ops.aten.index.Tensor and not any(_masks(index) for index in args[1])
        if not (whole or _NEEDS_DATA.isdisjoint(func.tags)):
            raise _UnknownError
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        self.contracts = self.contracts or _CONTRACTION.fullmatch(func.overloadpacket.__name__) is not None
        return func(*args, **(kwargs or {}))


def _masks(index: Any) -> bool:
    """Whether an index picks as many elements as its values say."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@dataclass
class _Trial:
    op: str
    target: Any
    args: Any
    kwargs: Any
    inputs: list[fx.Node]
    modules: dict[fx.Node, nn.Module]

    @property
    def free(self) -> list[FreeDim]:
        """What varies in the inputs, other than the batch."""
        found: list[FreeDim] = []
        for node in self.inputs:
            map_specs(lambda s: found.extend(s.free), node.meta.get("spec"))
        return found

    def elements(self) -> int:
        """Return how many elements a run reads."""
        found: list[int] = []
        for node in self.inputs:
            map_specs(lambda s: found.append(math.prod(s.concrete(_BATCHES[-1]))), node.meta.get("spec"))
        called = (self.target,) if self.op == "call_module" else ()
        found += [t.numel() for m in (*self.modules.values(), *called) for t in m.parameters()]
        return sum(found)

    def result(self, fake: bool) -> Inferred:
        watch = _Watch()
        views = False
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            first, second, third = (Point(batch) for batch in _BATCHES)
            seen = {}
            for point in (first, second, *([Point(first.batch, 1)] if self.free else [])):
                value, given = self._probed(point, fake, watch)
                views |= not given.isdisjoint(memories(value))
                seen[point] = tree_map(_spec, value)
            spec = _merge(seen, self.free)
            if _odd(spec):  # two points make any line: a third one tells a line from a curve
                value, _ = self._run(third, fake, watch)
                wanted = map_specs(lambda s: TensorSpec(s.concrete(_BATCHES[2]), s.dtype), spec)
                if _merge({third: tree_map(_spec, value)}, []) != wanted:
                    raise _UnknownError
        return Inferred(spec, watch.random, watch.contracts, views)

    def _probed(self, point: Point, fake: bool, watch: _Watch) -> tuple[Any, set[int]]:
        """Run at a point; what runs at the example's sizes alone is an error that nothing may hide."""
        try:
            return self._run(point, fake, watch)
        except Exception as error:
            if not point.probe:
                raise
            sizes = ", ".join(f"{dim.name} = {dim.other}" for dim in dict.fromkeys(self.free))
            raise VariesError(
                f"works at the sizes of the example inputs and not at {sizes}, which dynamic lets in "
                f"({error}); leave dynamic out, name in it only dimensions that do not reach this module, or "
                "use a method that takes them, such as 'dgl'"
            ) from error

    def _run(self, point: Point, fake: bool, watch: _Watch) -> tuple[Any, set[int]]:
        """Return the value at some sizes, and the memory of what it is computed from."""
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        with mode or nullcontext():
            values = {n: map_specs(lambda s: _filled(s, point), n.meta.get("spec")) for n in self.inputs}
            values.update((n, _copied(m, mode)) for n, m in self.modules.items())

            def value_of(node: fx.Node) -> Any:
                return size_of(node, values.__getitem__) if is_size(node) else values[node]

            args: Any = arguments(self.args, value_of)
            kwargs: Any = arguments(self.kwargs, value_of)
            given = memories(list(values.values()))
            if self.op == "call_module":
                module = _copied(self.target, mode)
                given |= memories([*module.parameters(), *module.buffers()])
            with watch:
                if self.op == "call_method":
                    value = getattr(args[0], self.target)(*args[1:], **kwargs)
                elif self.op == "call_module":
                    value = _call(module, args, kwargs)
                else:
                    value = self.target(*args, **kwargs)
            return value, given


def _filled(spec: TensorSpec, point: Point) -> Tensor:
    """Return a tensor that most operations accept: ones, and zeros where it may hold indices."""
    return torch.full(
        spec.concrete(point.batch or 0, point.probe), int(spec.differentiable), dtype=spec.dtype
    )


def _copied(module: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """Return a copy: what a module's code keeps on itself, and its statistics, stay as they are."""
    with FakeCopyMode(mode) if mode is not None else nullcontext():
        return copy.deepcopy(module)


def _call(module: nn.Module, args: Any, kwargs: Any) -> Any:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return module(*tree_map(move, args), **tree_map(move, kwargs))


def _spec(value: Any) -> Any:
    return TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def _merge(seen: dict[Point, Any], known: list[FreeDim]) -> Spec:
    first = next(iter(seen.values()))
    if isinstance(first, dict):
        return {key: _merge({p: v[key] for p, v in seen.items()}, known) for key in first}
    if isinstance(first, (tuple, list)):
        if any(len(v) != len(first) for v in seen.values()):
            raise _UnknownError
        return tuple(_merge({p: v[i] for p, v in seen.items()}, known) for i in range(len(first)))
    if not isinstance(first, TensorSpec):
        return None
    dims = fit({point: spec.concrete(0) for point, spec in seen.items()}, known)
    if dims is None:
        raise _UnknownError
    return TensorSpec(dims, first.dtype)


def _odd(spec: Spec) -> bool:
    found: list[BatchDim] = []
    map_specs(lambda s: found.extend(d for d in s.shape if isinstance(d, BatchDim)), spec)
    return any(d != BatchDim() for d in found)
