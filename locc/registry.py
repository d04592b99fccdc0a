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


def registered() -> dict[str, tuple[str, str]]:
    """Return, for each method id, where its class is and which package registers it."""
    return _survey()[0]


def broken() -> dict[str, Exception]:
    """Return what is wrong with packages that cannot be loaded, and with ids that two of them register."""
    return _survey()[1]


@cache
def _survey() -> tuple[dict[str, tuple[str, str]], dict[str, Exception]]:
    found: dict[str, tuple[str, str]] = {}
    wrong: dict[str, Exception] = {}
    for point in entry_points(group=GROUP):
        try:
            table = {str(name): str(location) for name, location in point.load().items()}
        except Exception as error:  # code of a third party: the others work without it
            wrong[point.name] = error
            continue
        for name, location in table.items():
            if name in found and found[name][0] != location:
                wrong[name] = MethodError(
                    f"two packages register the method '{name}': {found[name][0]} and {location}; "
                    "uninstall one"
                )
            found[name] = (location, point.name)
    return {name: place for name, place in found.items() if name not in wrong}, wrong


def load(name: str) -> type[Method]:
    """Return the class of a registered method.

    Raises:
        MethodError: no package registers the name, or it cannot be loaded (the cause is chained).
    """
    from locc.rewrite.passes import Method

    known, wrong = registered(), broken()
    if name not in known:
        raise _unknown(name) from wrong.get(name, next(iter(wrong.values()), None))
    location = known[name][0]
    module, _, attribute = location.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise MethodError(
            f"method '{name}' is registered as {location}, which cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise MethodError(f"method '{name}' is registered as {location}, which is not a locc Method class")
    return found


def _unknown(name: str) -> MethodError:
    known, wrong = registered(), broken()
    reasons = {place: f"{type(error).__name__}: {error}" for place, error in wrong.items()}
    if name in wrong:
        return MethodError(f"'{name}' is registered, but cannot be loaded: {reasons[name]}")
    hint = nearest(name, known) if known else "no package registers methods; reinstall locc"
    others = "".join(f"; '{place}' cannot be loaded: {reason}" for place, reason in reasons.items())
    return MethodError(f"there is no method '{name}'; {hint}{others}")


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
