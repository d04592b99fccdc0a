"""Submodules whose activations the backward pass computes again instead of keeping them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locc.errors import LoccError, nearest
from locc.ir import TrainingGraph
from locc.ir.captured import strip

State = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]
"""Modules with their parameters and buffers."""


def computed_again(ir: TrainingGraph, asked: bool | Sequence[str]) -> tuple[nn.Module, ...]:
    """Return the submodules of the model that are computed again.

    Args:
        ir: the training graph, whose calls of submodules are what can be.
        asked: their names or globs; True for every submodule that the splits leave whole and that has
            submodules of its own; False for none.

    Raises:
        LoccError: a name or glob, or True, finds none that is called.
    """
    if asked is False:
        return ()
    model = ir.root.get_submodule("model")
    whole = {strip(str(n.target)) for n in ir.nodes(role="forward") if n.op == "call_module"}
    found: dict[str, nn.Module] = {}
    if asked is True:
        named = ((name, model.get_submodule(name)) for name in sorted(whole))
        found = {name: module for name, module in named if any(True for _ in module.children())}
        if not found:
            raise LoccError(
                "recompute=True computes again what goes on inside of submodules, and with this method and "
                "these splits every submodule that is called is a single layer; leave it out"
            )
        return tuple(found.values())
    known = dict(model.named_modules())
    inside = {n: m for n, m in known.items() if _is_called(m) and any(_within(n, w) for w in whole)}
    for name in asked:
        hits = [n for n in inside if n.count(".") == name.count(".") and fnmatch.fnmatchcase(n, name)]
        if not hits and name in known:
            raise LoccError(
                f"recompute='{name}': the splits open that submodule, or its own forward is not called; name "
                f"one that is called as a whole, such as {', '.join(repr(n) for n in list(inside)[:3])}"
            )
        if not hits:
            raise LoccError(f"recompute='{name}' matches no submodule; {nearest(name.strip('.*?'), inside)}")
        found.update((n, inside[n]) for n in hits)
    return tuple(found.values())


def _within(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}.")


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward: containers such as `nn.ModuleList` have none."""
    return type(module).forward is not nn.Module.forward


@contextmanager
def recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the forward of some modules keep its inputs alone, for a backward pass inside of this context.

    The second run sees the random numbers, parameters and buffers of the first one, and what it does to
    buffers (running statistics) is dropped. It ends where all that the backward pass needs is there.
    """
    with replaced(modules, _checkpointed):
        yield


@contextmanager
def replaced(
    modules: Iterable[nn.Module], by: Callable[[Any, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give some modules another forward inside of this context: what `by` makes of each and its own."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in before:
        module.forward = by(module, module.forward)
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _checkpointed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        again = partial(forward, **kwargs)
        return checkpoint(again, *args, use_reentrant=False, context_fn=partial(_contexts, module))

    return run


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for the first run of a module, and for each later one with its state as it is now."""
    held = [(m, dict(m._parameters), _copies(m._buffers)) for m in module.modules()]
    return nullcontext(), _AsItWas(held)


class _AsItWas(AbstractContextManager[None]):
    """Gives modules a former state, for code whose writes to buffers are dropped.

    Several backward passes through one tape enter it one after the other, which `contextmanager` forbids.
    """

    def __init__(self, held: State) -> None:
        self.held, self.now = held, State()

    def __enter__(self) -> None:
        self.now = [(m, dict(m._parameters), dict(m._buffers)) for m, _, _ in self.held]
        _put([(m, parameters, _copies(buffers)) for m, parameters, buffers in self.held])

    def __exit__(self, *_: object) -> None:
        _put(self.now)


def _put(state: State) -> None:
    for module, parameters, buffers in state:
        module._parameters.update(parameters)
        module._buffers.update(buffers)


def _copies(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if b is None else b.clone() for name, b in buffers.items()}
