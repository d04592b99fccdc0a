"""A small batch with a target that the user's loss accepts; at compile time no target is known."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from locc.errors import LoccError
from locc.ir import Inputs, TensorSpec, TrainingGraph
from locc.ir.ops import Rebuild
from locc.ir.spec import BatchDim


@dataclass(frozen=True)
class Batch:
    """What the checks run on.

    Attributes:
        tensors: the model's inputs, in placeholder order.
        target: the user's own target, or one that was made up.
        size: number of samples.
        text: how the target was found, one clause for the certificate.
        stand_in: whether the user's loss was replaced by a sum over the outputs.
    """

    tensors: tuple[Tensor, ...]
    target: Any
    size: int
    text: str
    stand_in: bool = False


def small_batch(ir: TrainingGraph, inputs: Inputs, target: Any = None) -> Batch:
    """Cut the example inputs to a small batch and find a target for it.

    With a `target`, both are used as they are.
    """
    signature = ir.captured.signature
    tensors = [t.detach() for t in signature.bind(inputs)]
    size = signature.batch_of(tensors)
    if target is not None:
        return Batch(tuple(tensors), target, size, "the given target")
    if any(spec.batch_dim is not None for spec in signature.specs):
        allowed = [b for b in (2, 3, 4) if b < size and signature.allows(b)]
        if size == 1 and signature.allows(2):
            allowed = [2]  # BatchNorm refuses a batch of one
        size = allowed[0] if allowed else size
        tensors = [_resize(t, spec, size) for t, spec in zip(tensors, signature.specs, strict=True)]
    for text, candidate in _candidates(ir, size):
        if accepts(ir, size, candidate):
            return Batch(tuple(tensors), candidate, size, text)
    return Batch(tuple(tensors), None, size, "the user's loss accepts no target that could be made up", True)


def whole_batch(ir: TrainingGraph, inputs: Inputs, small: Batch, size: int | None = None) -> Batch:
    """Return the example inputs as they are, or that many, with a small one's target repeated."""
    signature = ir.captured.signature
    tensors = [t.detach() for t in signature.bind(inputs)]
    if size is None:
        size = signature.batch_of(tensors)
    else:
        tensors = [_resize(t, spec, size) for t, spec in zip(tensors, signature.specs, strict=True)]
    target = torch.utils._pytree.tree_map(lambda t: _repeat(t, small.size, size), small.target)
    return replace(small, tensors=tuple(tensors), target=target, size=size)


def _repeat(value: Any, size: int, wanted: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != size:
        return value
    return value[torch.arange(wanted, device=value.device) % size]


def _resize(tensor: Tensor, spec: TensorSpec, size: int) -> Tensor:
    for dim, extent in enumerate(spec.shape):
        if isinstance(extent, BatchDim) and tensor.shape[dim] != extent.at(size):
            rows = torch.arange(extent.at(size), device=tensor.device) % tensor.shape[dim]
            tensor = tensor.index_select(dim, rows)
    return tensor.clone()


def _candidates(ir: TrainingGraph, size: int) -> Iterator[tuple[str, Any]]:
    yield from _of_spec(ir, ir.prediction.meta.get("spec"), size)
    if len(ir.tasks) > 1 and all(len(task.path) == 1 for task in ir.tasks):
        yield from itertools.islice(_nested(ir, size), _MOST)
    yield "no target", None


_MOST = 256
"""How many nested targets are tried, at most."""


def _nested(ir: TrainingGraph, size: int) -> Iterator[tuple[str, Any]]:
    """Yield targets that hold one for each task, under the keys of the output."""
    keys = [task.path[0] for task in ir.tasks]
    for parts in itertools.product(*(_likely_first(ir, task.spec, size) for task in ir.tasks)):
        found = dict(zip(keys, (value for _, value in parts), strict=True))
        text = ", ".join(f"{key}: {text}" for key, (text, _) in zip(keys, parts, strict=True))
        yield text, tuple(found.values()) if keys == list(range(len(keys))) else found


def _likely_first(ir: TrainingGraph, spec: TensorSpec, size: int) -> list[tuple[str, Any]]:
    """Return targets for a prediction; numbers come first for what has a single channel (a depth)."""
    found = list(_of_spec(ir, spec, size))
    one = len(spec.shape) > 1 and 1 in (spec.shape[1], spec.shape[-1])
    return sorted(found, key=lambda made: not made[1].is_floating_point()) if one else found


def _of_spec(ir: TrainingGraph, spec: Any, size: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(spec, TensorSpec):
        return
    shape = spec.concrete(size)
    device = next((p.device for p in ir.root.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def classes(dims: tuple[int, ...], count: int) -> Tensor:
        return torch.randint(0, max(count, 1), dims, generator=generator).to(device)

    if len(shape) >= 2:
        if len(shape) == 4:
            yield f"class indices {[shape[0], *shape[2:]]}", classes((shape[0], *shape[2:]), shape[1])
        yield f"class indices {list(shape[:-1])}", classes(shape[:-1], shape[-1])
        if len(shape) == 3:
            yield f"class indices {[shape[0], shape[2]]}", classes((shape[0], shape[2]), shape[1])
        yield f"class indices [{shape[0]}]", classes(shape[:1], shape[-1])
    dtype = spec.dtype if spec.dtype.is_floating_point else torch.get_default_dtype()
    yield f"numbers {list(shape)}", torch.rand(shape, generator=generator).to(device, dtype)
    yield (
        f"numbers [{shape[0] if shape else ''}]",
        torch.rand(shape[:1], generator=generator).to(device, dtype),
    )


def accepts(ir: TrainingGraph, size: int, target: Any) -> bool:
    """Whether the user's loss takes a target, tried on random outputs of the model's shape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a target that is not the user's
            value = ir.loss_function(outputs_of(ir, size), target)
        return isinstance(value, Tensor) and value.dim() == 0 and bool(torch.isfinite(value))
    except Exception:  # whatever the user's loss raises, the candidate does not fit
        return False


def outputs_of(ir: TrainingGraph, size: int, known: Mapping[fx.Node, Tensor] = MappingProxyType({})) -> Any:
    """Return what the forward returns, of random numbers where no value is `known`."""

    def made(node: Any) -> Any:
        if node in known:
            return known[node]
        return made_up(ir, node, size) if isinstance(node, fx.Node) else node

    if isinstance(ir.output.target, Rebuild):
        return ir.output.target(*[made(a) for a in ir.output.args])
    return made(ir.output)


def made_up(ir: TrainingGraph, node: fx.Node, size: int) -> Tensor:
    """Return random numbers of a node's shape, for a batch of that size.

    Raises:
        LoccError: the node has no spec.
    """
    spec = node.meta["spec"]
    if not isinstance(spec, TensorSpec):
        raise LoccError(f"'{node.name}' has no spec")
    device = next((p.device for p in ir.root.parameters()), torch.device("cpu"))
    value = torch.zeros(spec.concrete(size), device=device)
    return (value.uniform_(0.05, 0.95) if spec.differentiable else value).to(spec.dtype)


def _sum_of_outputs(output: Any, target: Any) -> Tensor:
    """Stand in for the user's loss: depends on every output."""
    found = [
        v for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()
    ]
    if not found and hasattr(output, "__dict__"):
        found = [v for v in vars(output).values() if isinstance(v, Tensor) and v.is_floating_point()]
    return torch.stack([v.sum() for v in found]).sum()


@contextmanager
def standing_in(ir: TrainingGraph, active: bool) -> Iterator[None]:
    """Replace the user's loss in the graph by a sum over the outputs, where it cannot be evaluated."""
    calls = [n for n in ir.graph.nodes if active and n.target is ir.loss_function]
    stand_in: Callable[..., Any] = _sum_of_outputs
    for node in calls:
        node.target = stand_in
    try:
        yield
    finally:
        for node in calls:
            node.target = ir.loss_function
