"""Calls of closed modules in the concrete trace: results are read off real runs, never computed on fakes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from locc.capture.batch import merge
from locc.capture.eager import LeafCall, Sight
from locc.capture.graphs import RefusalError, access, remedy
from locc.capture.sizes import is_symbolic
from locc.capture.source import user_code
from locc.capture.targets import Region, printable
from locc.capture.tree import Path, flatten, spell
from locc.errors import CaptureError
from locc.ir.captured import strip
from locc.ir.spec import Dim

if TYPE_CHECKING:
    from locc.capture.concrete import Recorder


class Records:
    """What the closed modules returned in real runs at one or two batch sizes, call by call."""

    def __init__(self, runs: list[list[LeafCall]], batches: tuple[int | None, int | None]) -> None:
        self.runs, self.batches = runs, batches
        self.position = 0

    def next(self, path: str) -> list[LeafCall]:
        """Return the next call in every run, which must be one of the module at `path`."""
        found = [run[self.position] for run in self.runs if self.position < len(run)]
        self.position += 1
        if not found or found[0].path != path:
            expected = f"calls '{strip(found[0].path)}'" if found else "makes no further call"
            raise CaptureError(
                f"on fake tensors the forward calls '{strip(path)}' where in eager it {expected}, at "
                f"{user_code()}"
            )
        return [call for call in found if call.path == path and call.structure == found[0].structure]

    def dims(self, seen: list[tuple[int, ...]]) -> tuple[Dim, ...] | None:
        """Return the dims of a shape or stride that was seen in every run."""
        if len(seen) < 2 or self.batches[0] is None or self.batches[1] is None:
            return seen[0]
        return merge(seen[0], seen[1], (self.batches[0], self.batches[1]))


def record(recorder: Recorder, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
    """Write one call of a closed module into the graph and return its result on fake tensors."""
    calls = recorder.records.next(path)
    _check_arguments(recorder, module, path, args, kwargs, calls[0])
    region = Region.now()
    if region.autocast != recorder.outside.autocast or region.inference != recorder.outside.inference:
        raise RefusalError(
            f"'{strip(path)}' is called under autocast or inference_mode that the forward switches on, at "
            f"{user_code()}; switch it on outside of the model, or inside '{strip(path)}'"
        )
    values, structure = flatten((args, kwargs))
    given = {
        where: recorder.as_fake(value)
        for where, value in zip(structure.paths(), values, strict=True)
        if isinstance(value, Tensor)
    }
    near = list(given.values())
    node = recorder.emit("call_module", path, recorder.argument(args, near), recorder.argument(kwargs, near))
    detach = not region.grad and recorder.outside.grad
    return _results(recorder, path, node, calls, given, detach)


def _results(
    recorder: Recorder,
    path: str,
    node: fx.Node,
    calls: list[LeafCall],
    given: dict[Path, Tensor],
    detach: bool,
) -> Any:
    first = calls[0]
    results: list[Any] = []
    for i, where in enumerate(first.structure.paths()):
        seen = [call.results[i] for call in calls]
        if not isinstance(seen[0], Sight):
            results.append(_constant(recorder, path, where, seen))
            continue
        fake, renamed = _fake(recorder, path, seen, given, first.mutated)
        part = access(recorder.graph, node, where)
        part.meta.update(node.meta)
        if detach:  # the module ran under no_grad: same values, no tape
            part = recorder.emit("call_method", "detach", (part,), {})
            fake = fake if renamed else fake.detach()
        results.append(recorder.bind(fake, part))
    return first.structure.build(results)


def _fake(
    recorder: Recorder, path: str, seen: list[Sight], given: dict[Path, Tensor], mutated: set[Path]
) -> tuple[Tensor, bool]:
    sight = seen[0]
    source = given.get(sight.alias) if sight.alias is not None else None
    if source is not None and sight.same:
        changed = sight.alias in mutated
        return (source, True) if changed else (torch.ops.aten.alias(source), False)
    shape = recorder.records.dims([s.shape for s in seen])
    stride = recorder.records.dims([s.stride for s in seen])
    if shape is None:
        shapes = " and ".join(str(list(s.shape)) for s in seen)
        raise CaptureError(
            f"'{strip(path)}' returns shapes {shapes} for batches of {recorder.records.batches[0]} and "
            f"{recorder.records.batches[1]}, which is no fixed multiple of the batch size"
        )
    size = [recorder.sizes.of(d) for d in shape]
    if not sight.stride and sight.shape:
        stride = None
    steps = [recorder.sizes.of(d) for d in stride] if stride is not None else None
    if source is not None and steps is not None and not isinstance(source, nn.Parameter):
        return torch.as_strided(source, size, steps, sight.offset), False
    if steps is None:
        fake = torch.empty(size, dtype=sight.dtype, device=sight.device)
    else:
        fake = torch.empty_strided(size, steps, dtype=sight.dtype, device=sight.device)
    # a clone requires grad without being an autograd leaf, as a result does
    return (fake.requires_grad_().clone() if sight.requires_grad else fake), False


def _constant(recorder: Recorder, path: str, where: Path, seen: list[Any]) -> Any:
    value = seen[0]
    if type(value) is int and len(seen) > 1 and seen[1] != value:
        dims = recorder.records.dims([(v,) for v in seen])
        if dims is not None:
            return recorder.sizes.of(dims[0])
    if printable(value) or recorder.eager.lasting(value) or not hasattr(value, "__dict__"):
        return value
    kind = type(value).__name__
    raise CaptureError(
        f"'{strip(path)}' returns a {kind}{' in ' + repr(spell(where)) if where else ''}, which capture "
        f"cannot see into; {remedy(kind)}"
    )


def _check_arguments(
    recorder: Recorder, module: nn.Module, path: str, args: Any, kwargs: Any, seen: LeafCall
) -> None:
    if seen.refilled is not None:
        raise CaptureError(
            f"'{strip(path)}' changes a list or dict that it is given, at {user_code()}; "
            "return the value instead"
        )
    values, structure = flatten((args, kwargs))
    for where, value in zip(structure.paths(), values, strict=True):
        if isinstance(value, Tensor) or is_symbolic(value) or recorder.eager.lasting(value):
            continue
        if type(value) in (bytes, str, float, int, bool) or not hasattr(value, "__dict__"):
            continue
        kind = type(value).__name__
        raise CaptureError(
            f"argument '{argument_name(module, where)}' of '{strip(path)}' is a {kind} that the forward "
            f"makes and that modules may change ({user_code()}); {remedy(kind)}"
        )


def argument_name(module: nn.Module, where: Path) -> str:
    """Return the name of an argument of a module's forward."""
    (_, side), (_, key), *rest = where
    if side == 1:
        return spell(tuple(rest), str(key))
    names = list(inspect.signature(module.forward).parameters)
    return spell(tuple(rest), names[key] if key < len(names) else f"argument {key}")
