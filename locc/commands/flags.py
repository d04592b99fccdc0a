"""A method's options as command-line flags, generated from the fields of its dataclass."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Union

from locc.errors import LoccError, nearest

if TYPE_CHECKING:
    from locc.rewrite import Method


class MisuseError(LoccError):
    """The command line itself is wrong: the exit code is 2."""


@dataclass(frozen=True)
class Flag:
    """One option of a method.

    Attributes:
        field: the name of the dataclass field.
        flag: how it is spelled, with the leading dashes.
        kind: what it takes, for people: "FLOAT", "[a|b]", or "" for a switch.
        parse: turns the text into the value; None for a switch.
        default: the default value.
        help: what it is for.
    """

    field: str
    flag: str
    kind: str
    parse: Callable[[str], Any] | None
    default: Any
    help: str

    @property
    def spelling(self) -> str:
        """The flag with what it takes."""
        if self.parse is None:
            return f"{self.flag} / --no-{self.flag[2:]}"
        return f"{self.flag} {self.kind}"


def flags_of(method: type[Method], taken: Iterable[str] = ()) -> dict[str, Flag]:
    """Return a method's flags by spelling; one that is `taken` by the command becomes `--method-<name>`.

    Fields whose type no text can express (callables, networks) have no flag.
    """
    from locc.rewrite import options

    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(method)
    for name, entry in options(method).items():
        kind = _kind(hints.get(name, str))
        if kind is None:
            continue
        flag = "--" + name.replace("_", "-")
        if flag in taken:
            flag = f"--method-{flag[2:]}"
        parse = None if kind[0] == "" else kind[1]
        found[flag] = Flag(name, flag, kind[0], parse, _default(entry), str(entry.metadata.get("help", "")))
    return found


def take(
    flags: dict[str, Flag], known: Iterable[str], method: str, args: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into a method's options and the rest.

    Args:
        flags: the method's flags.
        known: the flags of the command itself, which are left alone.
        method: the method's id, for messages.
        args: the arguments of the command.

    Returns:
        The options by field name, and the arguments that are left.

    Raises:
        MisuseError: a flag is neither the command's nor the method's, or its value cannot be read.
    """
    switches = {f"--no-{f.flag[2:]}": f for f in flags.values() if f.parse is None}
    own = set(known)
    given: dict[str, Any] = {}
    rest: list[str] = []
    left = list(args)
    while left:
        token = left.pop(0)
        flag, equals, value = token.partition("=")
        if token == "--":
            return given, [*rest, token, *left]
        if flag in flags and flags[flag].parse is not None:
            if not equals and not left:
                raise MisuseError(f"{flag} needs a value: {flags[flag].spelling}")
            given[flags[flag].field] = _read(flags[flag], value if equals else left.pop(0))
        elif (flag in flags or flag in switches) and not equals:
            given[(flags.get(flag) or switches[flag]).field] = flag in flags
        elif flag.startswith("--") and flag not in own:
            raise MisuseError(_unknown(flag, flags, method, own))
        else:
            rest.append(token)
    return given, rest


def _unknown(flag: str, flags: dict[str, Flag], method: str, own: set[str]) -> str:
    found = f"there is no option {flag}; {nearest(flag, [o for o in (*own, *flags) if o.startswith('--')])}"
    if not flags:
        return f"{found} (--help lists all). Method '{method}' takes no options of its own"
    listed = "\n".join(f"  {f.spelling:<28} {f.help} (default: {f.default})" for f in flags.values())
    return f"{found} (--help lists all). Method '{method}' takes\n{listed}"


def _read(flag: Flag, text: str) -> Any:
    assert flag.parse is not None
    try:
        return flag.parse(text)
    except ValueError as error:
        raise MisuseError(f"{flag.flag} {text}: expected {flag.kind}") from error


def _default(entry: Field[Any]) -> Any:
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return "required" if entry.default is MISSING else entry.default


def _kind(hint: Any) -> tuple[str, Callable[[str], Any]] | None:
    """Return how a type reads in a help text ("" for a switch) and its parser; None for no such text."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return "", bool
    if hint is int:
        return "INT", int
    if hint is float:
        return "FLOAT", float
    if hint is str:
        return "TEXT", str
    if origin is Literal:
        return f"[{'|'.join(map(str, inside))}]", lambda text: _choose(text, {str(v): v for v in inside})
    if isinstance(hint, type) and issubclass(hint, Enum):
        members = {str(m.value): m for m in hint}
        return f"[{'|'.join(members)}]", lambda text: _choose(text, members)
    if origin in (Union, types.UnionType):
        return _either([_kind(part) for part in inside if part is not type(None)], type(None) in inside)
    if origin is tuple and len(inside) == 2 and inside[1] is Ellipsis:
        part = _kind(inside[0])
        return part and (f"{part[0]},...", lambda text: tuple(part[1](t) for t in text.split(",") if t))
    return None


def _either(
    parts: list[tuple[str, Callable[[str], Any]] | None], none: bool
) -> tuple[str, Callable[[str], Any]] | None:
    possible = [part for part in parts if part is not None]
    if not possible:
        return None

    def parse(text: str) -> Any:
        if none and text.lower() == "none":
            return None
        for kind, read in possible:
            try:
                return _choose(text.lower(), {"true": True, "false": False}) if kind == "" else read(text)
            except ValueError:
                continue
        raise ValueError(text)

    kinds = [kind or "true|false" for kind, _ in possible]
    return "|".join([*kinds, *(["none"] if none else [])]), parse


def _choose(text: str, values: dict[str, Any]) -> Any:
    if text not in values:
        raise ValueError(text)
    return values[text]
