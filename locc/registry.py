"""Finds methods: every installed package may register some under the entry point `locc.passes`.

An entry point holds a dict of method id -> "module:Class"; a class is loaded when it is asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import MISSING, dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from locc.errors import MethodError, nearest
from locc.rewrite.passes import Method, configure, options

GROUP = "locc.passes"


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a registered method."""

    name: str
    family: str
    reference: str
    summary: str
    options: dict[str, Any]
    package: str

    @property
    def modularity(self) -> str:
        """The verdict of the certificate for this method on a chain of four layers, with default options.

        Compiles that chain, the first time. On another model, or with other options, the certificate of
        the compiled program is what counts.

        Raises:
            MethodError: the method is undefined on a chain of four linear layers.
        """
        return _modularity(self.name)


@cache
def _modularity(name: str) -> str:
    from locc.compiler import compile  # the compiler asks the registry for methods

    with torch.random.fork_rng():
        chain = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), nn.Linear(8, 8))
        program = compile(chain, name, ["0", "1", "2"], example_inputs=torch.zeros(4, 8), seed=0)
    return program.certificate.verdict


@cache
def _registered() -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for point in entry_points(group=GROUP):
        for name, location in point.load().items():
            if name in found and found[name][0] != location:
                raise MethodError(
                    f"two packages register the method '{name}': {found[name][0]} and {location}; "
                    "uninstall one"
                )
            found[name] = (location, point.name)
    return found


def load(name: str) -> type[Method]:
    """Return the class of a registered method.

    Raises:
        MethodError: no package registers the name, or its class cannot be loaded.
    """
    known = _registered()
    if name not in known:
        hint = nearest(name, known) if known else "no package registers methods; reinstall locc"
        raise MethodError(f"there is no method '{name}'; {hint}")
    location = known[name][0]
    module, _, attribute = location.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise MethodError(
            f"method '{name}' is registered as {location}, which cannot be loaded: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise MethodError(f"method '{name}' is registered as {location}, which is not a locc Method class")
    return found


def method(name: str, **given: Any) -> Method:
    """Return a configured method, e.g. `locc.method("dtp", sigma=0.36)`.

    Raises:
        MethodError: the name or an option is unknown.
    """
    return configure(name, load(name), given)


def name_of(instance: Method) -> str:
    """Return the id under which a method's class is registered, or the class's own name."""
    place = f"{type(instance).__module__}:{type(instance).__qualname__}"
    return next(
        (n for n, (location, _) in _registered().items() if location == place), type(instance).__name__
    )


def methods() -> dict[str, MethodInfo]:
    """Return every registered method by id: family, reference, summary and options with defaults."""
    found = {}
    for name, (_, package) in sorted(_registered().items()):
        cls = load(name)
        defaults = {
            key: f.default_factory() if f.default_factory is not MISSING else f.default
            for key, f in options(cls).items()
        }
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        found[name] = MethodInfo(name, cls.family, cls.reference, summary, defaults, package)
    return found
