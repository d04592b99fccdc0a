"""`locc reproduce`: published results, trained again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from locc.commands.flags import MisuseError
from locc.commands.options import DebugOption
from locc.commands.show import out
from locc.errors import LoccError

if TYPE_CHECKING:
    from locc.reproduce.results import Result


def reproduce(
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]...", help="entries (dtp-mlp/dtp), settings (dtp-mlp) or globs; all unless given"
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="cpu; full, as long as published; try, a few steps; none, the page alone")
    ] = "cpu",
    data: Annotated[
        Path | None, typer.Option(help="folder of the data's files; default: $LOCC_DATA, or ../shared/data")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="how many seeds: 0, 1, ...; default: 3, or 1 of the GPT")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    results: Annotated[Path, typer.Option(help="file of results; what is in it is not trained again")] = Path(
        "out/reproduce.jsonl"
    ),
    page: Annotated[Path | None, typer.Option(help="write the table of all results to this file")] = None,
    debug: DebugOption = False,
) -> None:
    """Train published networks and methods, each beside bp, and keep their test results.

    A run that was cut goes on: with the budget "full" within a training, otherwise at the next seed.
    """
    from locc.reproduce.data import default_folder
    from locc.reproduce.page import page as written
    from locc.reproduce.results import Results
    from locc.reproduce.runner import run
    from locc.reproduce.table import select

    if page is not None and not page.parent.is_dir():
        raise MisuseError(f"the folder '{page.parent}' of '{page}' does not exist; create it first")
    found = Results(results)
    if budget != "none":
        try:
            chosen = select(ids or (), budget)
            run(chosen, budget, seeds, data or default_folder(), found, device, _tell)
        except LoccError as error:
            raise MisuseError(str(error)) from error
    if page is not None:
        page.write_text(written(found), encoding="utf-8")
        out().print(Text(f"wrote {page}"))


def _tell(result: Result) -> None:
    value = result.error[:150] if result.value is None else f"{result.value:.4g}"
    out().print(Text(f"{result.entry}, seed {result.seed}: {value} ({result.seconds:.0f} s)"), soft_wrap=True)
