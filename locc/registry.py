"""Finds methods: every installed package may register some under the entry point `locc.passes`.

An entry point holds a dict of method id -> "module:Class"; a class is loaded when it is asked for.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from locc.errors import MethodError, nearest

if TYPE_CHECKING:  # a list of names, and shell completion, need no PyTorch
    from locc.rewrite.passes import Method

GROUP = "locc.passes"


@cache
def registered() -> dict[str, tuple[str, str]]:
    """Return, for each method id, where its class is and which package registers it.

    Raises:
        MethodError: two packages register one id.
    """
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
    from locc.rewrite.passes import Method

    known = registered()
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
    from locc.rewrite.passes import configure

    return configure(name, load(name), given)


def name_of(instance: Method) -> str:
    """Return the id under which a method's class is registered, or the class's own name."""
    place = f"{type(instance).__module__}:{type(instance).__qualname__}"
    return next(
        (n for n, (location, _) in registered().items() if location == place), type(instance).__name__
    )
