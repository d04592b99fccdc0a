"""What the commands print."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn, TextIO

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from locc.commands.flags import Flag, MisuseError, flags_of
from locc.errors import LoccError, LoccWarning
from locc.registry import load

if TYPE_CHECKING:
    from locc.catalogue import MethodInfo
    from locc.examination import Examination
    from locc.runtime.history import History


def out(stderr: bool = False) -> Console:
    """Return the console of standard output, or error, as it is now (tests replace it).

    Among the processes that `torchrun` starts, the first one speaks for all.
    """
    return Console(highlight=False, stderr=stderr, quiet=not stderr and not leads())


def leads() -> bool:
    """Return whether this is the only process, or the first of those that `torchrun` has started."""
    return os.environ.get("RANK", "0") == "0"


def fail(error: BaseException | str, misuse: bool = False, kind: str = "") -> NoReturn:
    """Print one message to standard error and leave with 2 for misuse, 1 for everything else."""
    text = Text("error: ", style="bold red")
    text.append(f"{kind}{error}", style="default")
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
    raise typer.Exit(2 if misuse or isinstance(error, MisuseError) else 1)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning, in the place of `warnings.showwarning`; of locc's own, without the line of code."""
    place = "" if issubclass(category, LoccWarning) else f"{filename}:{lineno}: {category.__name__}: "
    out(stderr=True).print(Text(f"warning: {place}{message}"), soft_wrap=True)


def method_table(methods: Iterable[MethodInfo]) -> Table:
    """Return the registered methods, one a row."""
    table = Table(title="methods", title_justify="left")
    for column in ("name", "family", "reference", "options", "trains with"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for info in methods:
        if info.error is not None:
            what = f"{type(info.error).__name__}: {info.error}"
            table.add_row(info.name, Text("broken", style="red"), Text(what), "", "")
            continue
        options = ", ".join(f"{k}={o.default}" for k, o in info.options.items())
        spec = str(info.recipe.modules)
        table.add_row(info.name, info.family, Text(info.reference), Text(options), Text(spec))
    return table


def show_method(info: MethodInfo) -> None:
    """Print everything that is known of a method."""
    cls = load(info.name)
    console = out()
    console.print(
        Text(info.name, style="bold"),
        Text(f"({info.family}; {info.reference}; {info.modularity} on a chain; from {info.package})"),
    )
    console.print()
    for line in (cls.__doc__ or "").strip().splitlines():
        console.print(Text(line.removeprefix("    ")))
    console.print()
    console.print(Text(f"trains with {info.recipe}"), soft_wrap=True)
    if info.published != info.recipe:
        console.print(Text(f"published with {info.published}"), soft_wrap=True)
    if info.published.network:
        console.print(Text(f"for networks with {info.published.network}"), soft_wrap=True)
    console.print()
    console.print(flag_table(info.name, flags_of(cls)))


def flag_table(method: str, flags: dict[str, Flag]) -> Table | Text:
    """Return a method's options on the command line."""
    if not flags:
        return Text(f"method '{method}' takes no options of its own")
    table = Table(title=f"options of method '{method}'", title_justify="left")
    table.add_column("flag", no_wrap=True)
    table.add_column("default")
    table.add_column("meaning", overflow="fold")
    for flag in flags.values():
        table.add_row(Text(flag.spelling), Text(str(flag.default)), Text(flag.help))
    return table


def show_examination(found: Examination, ir: bool, plan: bool) -> None:
    """Print what `inspect` found."""
    console = out()
    style = "green" if found.ok else "red"
    console.print(
        Text(f"{found.model}, method '{found.method}': "),
        Text(found.verdict, style=style),
        sep="",
        soft_wrap=True,
    )
    console.print(f"{found.parameters:,} trainable parameters")
    for names in found.tied:
        console.print(Text(f"tied: {' = '.join(names)}"), soft_wrap=True)
    if found.modules:
        console.print(_modules(found))
    if found.crossings:
        console.print(_crossings(found))
    for text in (*[f"coupling: {c}" for c in found.couplings], *[f"note: {n}" for n in found.notes]):
        console.print(Text(text), soft_wrap=True)
    if ir and (found.ir or found.partition):
        _code(console, found.ir or found.partition or "")
    if plan and found.plan:
        console.print(Text(found.plan), soft_wrap=True)


def _code(console: Console, text: str) -> None:
    if console.is_terminal:
        console.print(Syntax(text, "python", background_color="default", word_wrap=False))
    else:
        console.print(Text(text), soft_wrap=True)


def _modules(found: Examination) -> Table:
    table = Table(title=f"modules (captured by {found.captured_by})", title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("added", justify="right")
    table.add_column("objectives", overflow="fold")
    for module in found.modules:
        name = f"{module.name} (auxiliary)" if module.auxiliary else module.name
        objectives = ", ".join(o.removeprefix(f"{module.name}.") for o in module.objectives) or "-"
        added = f"{module.added:,}" if module.added else ""
        table.add_row(Text(name), f"{module.parameters:,}", added, Text(objectives))
    return table


def _crossings(found: Examination) -> Table:
    table = Table(title="boundary values", title_justify="left")
    for column in ("from", "to", "value", "type"):
        table.add_column(column, overflow="fold")
    table.add_column("bytes per sample", justify="right")
    for c in found.crossings:
        table.add_row(
            Text(c.producer), Text(c.consumer), Text(c.name), Text(c.spec), f"{c.bytes_per_sample:,}"
        )
    return table


def show_history(history: History) -> None:
    """Print the objectives of every module at the end of training."""
    if not history.epochs:
        return
    last = history.epochs[-1]
    table = Table(title=f"objectives, mean of epoch {last.number}", title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("objective")
    table.add_column("value", justify="right")
    for name, value in last.objectives.items():
        module, _, objective = name.rpartition(".")
        table.add_row(Text(module), Text(objective), f"{value:.4g}")
    out().print(table)


def describe(error: Exception) -> tuple[str, bool]:
    """Return how an error is told, and whether it is misuse."""
    if isinstance(error, MisuseError):
        return str(error), True
    if isinstance(error, LoccError):
        return f"{type(error).__name__}: {error}", False
    return f"{type(error).__name__}: {error} (--debug shows where)", False
