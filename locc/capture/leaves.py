"""Calls of closed modules in the concrete trace: results are read off real runs, never computed on fakes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc.capture.eager import LeafCall, Sight
from locc.capture.graphs import RefusalError, access, remedy
from locc.capture.ledger import Ledger
from locc.capture.sizes import is_symbolic
from locc.capture.source import user_code
from locc.capture.targets import Region, printable
from locc.capture.tree import Path, flatten, spell
from locc.errors import CaptureError
from locc.ir.captured import strip


def record(ledger: Ledger, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
    """Write one call of a closed module into the graph and return its result on fake tensors."""
    calls = ledger.records.next(path)
    _check_arguments(ledger, module, path, args, kwargs, calls)
    region = Region.now()
    if region.autocast != ledger.outside.autocast or region.inference != ledger.outside.inference:
        raise RefusalError(
            f"'{strip(path)}' is called under autocast or inference_mode that the forward switches on, at "
            f"{user_code()}; switch it on outside of the model, or inside '{strip(path)}'"
        )
    values, structure = flatten((args, kwargs))
    given = {
        where: ledger.as_fake(value)
        for where, value in zip(structure.paths(), values, strict=True)
        if isinstance(value, Tensor)
    }
    near = list(given.values())
    node = ledger.emit("call_module", path, ledger.argument(args, near), ledger.argument(kwargs, near))
    if calls[0].mutated:
        ledger.writers.add(node)
    detach = not region.grad and ledger.outside.grad
    returned = _results(ledger, path, node, calls, given, detach)
    if calls[0].refilled:
        _refill(ledger, path, (args, kwargs), calls, given, returned)
    return calls[0].structure.build(list(returned.values()))


def _results(
    ledger: Ledger,
    path: str,
    node: fx.Node,
    calls: list[LeafCall],
    given: dict[Path, Tensor],
    detach: bool,
) -> dict[Path, Any]:
    """Return what the module returned, by path."""
    first = calls[0]
    results: dict[Path, Any] = {}
    for i, where in enumerate(first.structure.paths()):
        seen = [call.results[i] for call in calls]
        if not isinstance(seen[0], Sight):
            results[where] = _constant(ledger, path, where, seen)
            continue
        fake, renamed = _fake(ledger, path, seen, given, first.mutated)
        part = access(ledger.graph, node, where)
        part.meta.update(node.meta)
        if detach:  # the module ran under no_grad: same values, no tape
            part = ledger.emit("call_method", "detach", (part,), {})
            fake = fake if renamed else fake.detach()
        results[where] = ledger.bind(fake, part)
    return results


def _refill(
    ledger: Ledger,
    path: str,
    arguments: Any,
    calls: list[LeafCall],
    given: dict[Path, Tensor],
    returned: dict[Path, Any],
) -> None:
    """Change the caller's lists and dicts as the module did, in so far as the graph has the values."""
    for where, refill in calls[0].refilled.items():
        seen = [call.refilled[where].value for call in calls]
        if refill.result is not None:
            value = returned[refill.result]
        elif isinstance(refill.value, Sight):
            value, _ = _fake(ledger, path, seen, given, set())
            name = argument_name(ledger.root.get_submodule(path), where)
            ledger.lose(
                value, f"what '{strip(path)}' put into its argument '{name}', and did not return, is used"
            )
        else:
            value = _constant(ledger, path, where, seen)
        *above, (kind, key) = where
        container = arguments
        for step, inner in above:
            container = getattr(container, inner) if step == "attr" else container[inner]
        if kind == "attr":
            object.__setattr__(container, key, value)
        else:
            container[key] = value


def _fake(
    ledger: Ledger, path: str, seen: list[Sight], given: dict[Path, Tensor], mutated: set[Path]
) -> tuple[Tensor, bool]:
    sight = seen[0]
    source = given.get(sight.alias) if sight.alias is not None else None
    if source is not None and sight.same:
        changed = sight.alias in mutated
        return (source, True) if changed else (torch.ops.aten.alias(source), False)
    shape = ledger.records.dims([s.shape for s in seen])
    if shape is None:
        shapes = " and ".join(str(list(s.shape)) for s in seen)
        points = " and ".join(ledger.eager.call.text(point) for point in ledger.records.points)
        raise CaptureError(
            f"'{strip(path)}' returns shapes {shapes} for {points}, which is no fixed multiple of the "
            "batch size"
        )
    size = [ledger.sizes.of(d) for d in shape]
    order = _order(seen)
    stride = None if order is not None or not sight.stride else ledger.records.dims([s.stride for s in seen])
    steps = [ledger.sizes.of(d) for d in stride] if stride is not None else None
    if order is not None:
        back = [order.index(i) for i in range(len(order))]
        fake = torch.empty([size[i] for i in order], dtype=sight.dtype, device=sight.device).permute(back)
        steps = list(fake.stride())
    if source is not None and steps is not None and not isinstance(source, nn.Parameter):
        return torch.as_strided(source, size, steps, sight.offset), False
    if steps is None:
        fake = torch.empty(size, dtype=sight.dtype, device=sight.device)
    elif order is None:
        fake = torch.empty_strided(size, steps, dtype=sight.dtype, device=sight.device)
    # a clone requires grad without being an autograd leaf, as a result does
    return (fake.requires_grad_().clone() if sight.requires_grad else fake), False


def _order(seen: list[Sight]) -> list[int] | None:
    """Return the order of dimensions, outermost first, in which every result lies in memory without gaps."""
    first = seen[0]
    if len(first.stride) != len(first.shape):
        return None
    order = sorted(range(len(first.shape)), key=lambda i: (-first.stride[i], -first.shape[i], i))
    for sight in seen:
        step = 1
        for i in reversed(order):
            if sight.stride[i] != step:
                return None
            step *= sight.shape[i]
    return order


def _constant(ledger: Ledger, path: str, where: Path, seen: list[Any]) -> Any:
    value = seen[0]
    if type(value) is int and len(seen) > 1 and seen[1] != value:
        dims = ledger.records.dims([(v,) for v in seen])
        if dims is not None:
            return ledger.sizes.of(dims[0])
    if printable(value) or ledger.eager.lasting(value) or not hasattr(value, "__dict__"):
        return value
    kind = type(value).__name__
    raise CaptureError(
        f"'{strip(path)}' returns a {kind}{' in ' + repr(spell(where)) if where else ''}, which capture "
        f"cannot see into; {remedy(kind)}"
    )


def _check_arguments(
    ledger: Ledger, module: nn.Module, path: str, args: Any, kwargs: Any, calls: list[LeafCall]
) -> None:
    seen = calls[0]
    if seen.resized or any(call.refilled.keys() != seen.refilled.keys() for call in calls):
        raise CaptureError(
            f"'{strip(path)}' adds to, or takes from, a list or dict that it is given, at {user_code()}; "
            "return the value instead"
        )
    values, structure = flatten((args, kwargs))
    for where, value in zip(structure.paths(), values, strict=True):
        if isinstance(value, Tensor) or is_symbolic(value) or ledger.eager.lasting(value):
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
