"""docs/methods: a page for each registered method, and the survey's Table I of all of them.

The words of a page come from the method's class, its facts from `benchmarks.reference`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.filesize import decimal

import locc
from benchmarks.reference import BEFORE, facts, size, yes
from locc.catalogue import Option
from locc.registry import load

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
_TABLE = r"^\|.*(\n\|.*)*"


def page(name: str) -> str:
    """Return the page of a method."""
    info, f = locc.methods()[name], facts(name)
    c, where = f.program.certificate, "before" if name in BEFORE else "after"
    owners = []
    for o in c.owners:
        trained = ", ".join(x.name.removeprefix(f"{o.name}.") for x in o.objectives) or "formulas"
        waits = (_names(o.update_waits_for), _names(o.backward_waits_for))
        owners.append((f"`{o.name}`", trained, yes(o.forward_locked), *waits, f.flops(o.name)))
    held = [(m, role, part) for m, parts in f.program.auxiliaries.items() for role, part in parts.items()]
    networks = [(f"`{module}`", role, size(part.parameters())) for module, role, part in held]
    flows = [(f"`{a}`", f"`{b}`", k, f"`{s}`", d, decimal(n)) for (a, b, k, s, d), n in f.flows().items()]
    options = [(f"`{o.name}`", f"`{o.default}`", _range(o), o.help) for o in info.options.values()]
    parts = [
        f"# `{name}`", f"{info.reference}.", _linked(inspect.getdoc(load(name)) or "", name),
        f"Trains by {info.recipe}.",
        f"Published with {info.published}." * (info.published != info.recipe),
        f"Published for networks with {info.published.network}." * bool(info.published.network),
        "## Options", table(["option", "default", "worth trying", "meaning"], options),
        "## Facts", f"Of a {f.network}, cut {where} each hidden nonlinearity; [how to read them](README.md).",
        table(["", ""], [*f.table_one().items(), *f.costs().items()]),
        f"It is {c.verdict}: {'; '.join(c.reasons)}.",
        f"Pipeline-exact: {yes(c.pipeline_exact)}; {c.pipeline_reason}.",
        table(["owner", "trains by", "forward-locked", "waits for forward", "for backward", "flops"], owners),
        table(["part", "flops"], [*f.dear().items()]),
        table(["module", "auxiliary network", "parameters"], networks),
        table(["from", "to", "kind", "type", "direction", "in a batch"], flows),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def index(text: str, pages: Mapping[str, str]) -> str:
    """Return the text of the index with the rows of its two tables anew: what the methods' pages say."""
    known = {name: dict(_cells(line) for line in _first_table(page)) for name, page in pages.items()}

    def filled(found: re.Match[str]) -> str:
        header = _cells(found[0].splitlines()[0])
        return table(
            header, [(f"[`{n}`]({n}.md)", *(f[key] for key in header[1:])) for n, f in known.items()]
        )

    return re.sub(_TABLE, filled, text, flags=re.M)


def _first_table(page: str) -> list[str]:
    """Return the rows under "Facts": an entry of the index and its value."""
    found = re.search(_TABLE, page.partition("\n## Facts\n")[2], flags=re.M)
    return found[0].splitlines()[2:] if found else []


def _cells(line: str) -> list[str]:
    return [cell.replace("\\|", "|") for cell in line[2:-2].split(" | ")]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, or nothing where there are no rows."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""


def _names(owners: Iterable[str]) -> str:
    return ", ".join(f"`{o}`" for o in owners) or "none"


def _range(option: Option) -> str:
    if option.range is None:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    return f"{option.range[0]:g} to {option.range[1]:g}" + ", by ratio" * option.log


def _linked(text: str, own: str) -> str:
    """Let the other methods that a text names be links to their pages."""
    others = "|".join(re.escape(name) for name in locc.methods() if name != own)
    return re.sub(f"`({others})`", r"[`\1`](\1.md)", text)


def main(names: Sequence[str]) -> None:
    """Write the pages of some methods, or all of them, and the index, which is read off the pages."""
    for name in names or locc.methods():
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    (FOLDER / "README.md").write_text(index(text, written()), encoding="utf-8")


def written() -> dict[str, str]:
    """Return the pages of all methods as they lie in the folder."""
    return {name: (FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in locc.methods()}


if __name__ == "__main__":
    main(sys.argv[1:])
