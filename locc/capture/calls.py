"""Follows the calls of modules while a forward runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from locc.capture.state import settle
from locc.errors import CaptureError, nearest
from locc.ir.captured import Inputs, Root, strip
from locc.markers import split
from locc.snapshot import preserved, structure

Stack = tuple[tuple[str, int], ...]
Handler = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Calls:
    """The modules of a root under their canonical paths, and the stack of the calls that run now."""

    def __init__(self, root: Root, opened: Iterable[str] = ()) -> None:
        self.paths: dict[int, str] = {id(m): path for path, m in root.named_modules()}
        self.opened = {id(root), *(id(_module(root, path)) for path in opened)}
        self.stack: list[tuple[str, int]] = []
        self._counts: Counter[str] = Counter()

    def knows(self, module: nn.Module) -> bool:
        """Whether the module is registered under the root."""
        return id(module) in self.paths

    def is_leaf(self, module: nn.Module) -> bool:
        """Whether the module stays closed."""
        return id(module) not in self.opened

    @contextmanager
    def enter(self, module: nn.Module) -> Iterator[str]:
        """Put a call of `module` on the stack; yields its canonical path."""
        path = self.paths[id(module)]
        self.stack.append((path, self._counts[path]))
        self._counts[path] += 1
        try:
            yield path
        finally:
            self.stack.pop()

    def now(self) -> Stack:
        """Return the calls that run now, outermost first."""
        return tuple(self.stack)


def _module(root: Root, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        known = [strip(name) for name, _ in root.named_modules() if name.startswith("model")]
        raise CaptureError(
            f"'{strip(path)}' was to be opened, but is no submodule of the model; "
            f"{nearest(strip(path), known)}"
        ) from None


@contextmanager
def intercepting(handler: Handler) -> Iterator[None]:
    """Send every call of a module on this thread to `handler(module, call, args, kwargs)`."""
    original, thread = nn.Module.__call__, threading.get_ident()

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(self, *args, **kwargs)
        return handler(self, original, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


class _Markers(TorchFunctionMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.names: list[str] = []
        self.opened: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is split:
            self.names.append(kwargs["name"] if kwargs and "name" in kwargs else args[1])
            for path in filter(None, (path for path, _ in self.calls.stack)):
                atoms = path.split(".")
                self.opened |= {".".join(atoms[: i + 1]) for i in range(len(atoms))}
        return func(*args, **(kwargs or {}))


def marker_ancestors(root: Root, inputs: Inputs) -> tuple[frozenset[str], tuple[str, ...]]:
    """Run the model once and find its `locc.split` markers.

    What a model sets up at its first call, and at no later one, stays: it is part of what is captured.

    Returns:
        The paths of the modules that call a marker with all their ancestors (these must be opened),
        and the names of the markers in the order in which they are reached.

    Raises:
        CaptureError: the model fails on these inputs, or a name is used twice.
    """
    calls = Calls(root)
    markers = _Markers(calls)

    def handle(module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not calls.knows(module):
            return call(module, *args, **kwargs)
        with calls.enter(module):
            return call(module, *args, **kwargs)

    def run() -> None:
        try:
            root(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise CaptureError(
                f"the model itself fails on the example inputs: {type(error).__name__}: {error}"
            ) from error

    found = structure(root)
    with preserved(root), intercepting(handle), markers:
        run()
        settled = structure(root) == found
    if not settled:
        settle(root, run)
    twice = [name for name, count in Counter(markers.names).items() if count > 1]
    if twice:
        raise CaptureError(
            f"the split marker '{twice[0]}' is reached {markers.names.count(twice[0])} times in one forward; "
            "give each marker a name of its own, or cut by submodule name"
        )
    modules = {path for path in markers.opened if isinstance(root.get_submodule(path), nn.Module)}
    return frozenset(modules), tuple(markers.names)
