"""A command whose `--method` decides which further options it has."""

from __future__ import annotations

import itertools
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from locc import registry
from locc.commands.flags import Flag, flags_of, take
from locc.commands.show import fail, flag_table
from locc.errors import LoccError

DEFAULT = "bp"
METHOD_OPTIONS = "locc.method_options"
_ARGUMENTS = "locc.arguments"


class MethodCommand(TyperCommand):
    """Takes the chosen method's options off the command line before the rest is parsed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Split off the method's options; `ctx.meta` keeps them for the command."""
        ctx.meta[_ARGUMENTS] = list(args)
        if "--help" not in args and not ctx.resilient_parsing:
            try:
                method = _method_in(args) or DEFAULT
                given, args = take(self._flags(method), self._own(), method, args)
            except LoccError as error:
                fail(error, misuse=True)
            ctx.meta[METHOD_OPTIONS] = given
        return list(super().parse_args(ctx, args))

    def get_help(self, ctx: Any) -> str:
        """Return the help, and after it the options of the chosen method."""
        method, text = _method_in(ctx.meta.get(_ARGUMENTS, [])), str(super().get_help(ctx))
        if method is None:
            return f"{text}\n\nA method's own options: `locc methods dtp`, or --method dtp before --help."
        try:
            flags = self._flags(method)
        except LoccError as error:
            fail(error, misuse=True)
        console = Console()
        with console.capture() as captured:
            console.print(flag_table(method, flags))
        return f"{text}\n\n{captured.get().rstrip()}"

    def _own(self) -> list[str]:
        spelled = [name for p in self.params for name in (*p.opts, *p.secondary_opts)]
        return [*spelled, "--help"]

    def _flags(self, method: str) -> dict[str, Flag]:
        return flags_of(registry.load(method), self._own())


def _method_in(args: list[str]) -> str | None:
    """Return the method that a command line chooses; the last one counts, as for any option."""
    found = None
    for token, after in itertools.pairwise([*args, ""]):
        if token in ("--method", "-m"):
            found = after
        elif token.startswith("--method="):
            found = token.removeprefix("--method=")
    return found


def method_options(ctx: typer.Context) -> dict[str, Any]:
    """Return the method options of the running command, by field name."""
    given: dict[str, Any] = ctx.meta.get(METHOD_OPTIONS, {})
    return given
