"""docs/methods is what `make pages` writes."""

from __future__ import annotations

import re

import pytest

import locc
from benchmarks.pages import FOLDER, index, page, written

QUICK = ("al", "dfa", "dtp")
INDEX = (FOLDER / "README.md").read_text()


def test_every_method_has_its_page_and_its_rows():
    known = list(locc.methods())
    assert sorted(p.stem for p in FOLDER.glob("*.md")) == sorted([*known, "README"])
    assert re.findall(r"^\| \[`([\w-]+)`\]\(\1\.md\)", INDEX, flags=re.M) == 2 * known


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in locc.methods()]
)
def test_a_page_is_what_its_method_says_now(name):
    assert page(name) == (FOLDER / f"{name}.md").read_text(), "run `make pages`"


def test_the_index_is_what_the_pages_say():
    assert index(INDEX, written()) == INDEX, "run `make pages`"
