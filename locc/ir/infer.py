"""What a node of the graph computes, found by running it on shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from locc.ir.captured import owned_tensor
from locc.ir.spec import BatchDim, Dim, Spec, TensorSpec, map_specs

_BATCHES = (6, 8, 11)
_CONTRACTIONS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "convolution", "linalg", "cholesky")
_MORE = ("triangular_solve", "lu_", "scaled_dot_product", "_scaled_dot_product", "_linalg", "_conv")


@dataclass(frozen=True)
class Inferred:
    """What a node yields.

    Attributes:
        spec: shape and dtype of its value.
        random: whether it draws random numbers.
        contracts: whether it multiplies or solves matrices.
    """

    spec: Spec
    random: bool
    contracts: bool


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random = self.contracts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        self.contracts |= name in _CONTRACTIONS or name.startswith((*_CONTRACTIONS[7:], *_MORE))
        return func(*args, **(kwargs or {}))


def infer(root: nn.Module, op: str, target: Any, args: Any, kwargs: Any) -> Inferred | None:
    """Run an operation on shapes, at two batch sizes or three.

    Returns:
        What it yields, or None where that cannot be known: an input without a spec (the target), code that
        needs data, or a shape that is no multiple of the batch size.
    """
    watch = _Watch()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            results = [_run(root, op, target, args, kwargs, batch, watch) for batch in _BATCHES[:2]]
            spec = _merge(results, _BATCHES[:2])
            if _odd(spec):  # two points make any line: a third one tells a line from a curve
                third = _run(root, op, target, args, kwargs, _BATCHES[2], watch)
                if _merge([third], _BATCHES[2:]) != map_specs(lambda s: _at(s, _BATCHES[2]), spec):
                    return None
    except Exception:  # whatever an operation raises on shapes alone, nothing is known of it
        return None
    return Inferred(spec, watch.random, watch.contracts)


class _UnknownError(Exception):
    pass


def _run(root: nn.Module, op: str, target: Any, args: Any, kwargs: Any, batch: int, watch: _Watch) -> Any:
    inputs: list[fx.Node] = []
    fx.map_arg((args, kwargs), inputs.append)
    held = {n: owned_tensor(root, str(n.target)) for n in inputs if n.op == "get_attr"}
    modules = op == "call_module" or any(isinstance(h, nn.Module) for h in held.values())
    fake = FakeTensorMode(allow_non_fake_inputs=True) if modules else None
    device = "cpu" if fake is not None else "meta"

    def value(node: fx.Node) -> Any:
        if fake is not None and isinstance(module := held.get(node), nn.Module):
            return _copy(fake, module)
        spec = node.meta.get("spec")
        if spec is None:
            raise _UnknownError
        return map_specs(lambda s: s.empty(batch, device), spec)

    with fake or nullcontext(), watch:
        a, k = fx.map_arg(args, value), fx.map_arg(kwargs, value)
        if op == "call_method":
            result = getattr(a[0], target)(*a[1:], **k)
        elif fake is not None and op == "call_module":
            result = _call(_copy(fake, root.get_submodule(str(target))), a, k)
        else:
            function: Callable[..., Any] = target
            result = function(*a, **k)
    return tree_map(_spec, result)


def _copy(fake: FakeTensorMode, module: nn.Module) -> nn.Module:
    """Return a module of shapes alone: what its code keeps on itself stays out of the real one."""
    with FakeCopyMode(fake):
        return copy.deepcopy(module)


def _call(module: nn.Module, args: Any, kwargs: Any) -> Any:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return module(*tree_map(move, args), **tree_map(move, kwargs))


def _spec(value: Any) -> Any:
    return TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def _merge(found: list[Any], batches: tuple[int, ...]) -> Spec:
    first, last = found[0], found[-1]
    if isinstance(first, dict):
        return {key: _merge([f[key] for f in found], batches) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(_merge([f[i] for f in found], batches) for i in range(len(first)))
    if not isinstance(first, TensorSpec):
        return None
    if len(first.shape) != len(last.shape):
        raise _UnknownError
    pairs = zip(first.shape, last.shape, strict=True)
    return TensorSpec(tuple(_dim(a, b, batches) for a, b in pairs), first.dtype)


def _dim(a: Any, b: Any, batches: tuple[int, ...]) -> Dim:
    if a == b:
        return int(a)
    scale, rest = divmod(b - a, batches[-1] - batches[0])
    if rest:
        raise _UnknownError
    return BatchDim(scale, a - scale * batches[0])


def _at(spec: TensorSpec, batch: int) -> TensorSpec:
    return TensorSpec(spec.concrete(batch), spec.dtype)


def _odd(spec: Spec) -> bool:
    found: list[BatchDim] = []
    map_specs(lambda s: found.extend(d for d in s.shape if isinstance(d, BatchDim)), spec)
    return any(d != BatchDim() for d in found)
