"""A sample of the lowering's mutants, and what their harness is worth; `make mutants` judges them all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from mutants import lowering, run
from mutants.judge import ACCEPTED, NOTHING, Mutant
from mutants.lowering import BY_HAND, Judge, Verdict, found, work
from mutants.oracle import Truth
from mutants.report import Result

SAMPLE = {
    **{("by hand", name): None for name in BY_HAND},
    ("dgl", "tied"): 2,
    ("altmin", "buffers"): 2,
    ("dni", "residual"): 2,
    ("dtp", "custom function"): 1,
    ("al", "plain"): 1,
}
"""Programs, and the most mutants of a kind that are judged."""


@cache
def verdicts(method: str, shape: str) -> list[Verdict]:
    return work((method, shape, SAMPLE[method, shape]))


@pytest.mark.parametrize(("method", "shape"), SAMPLE)
def test_no_mutant_of_the_lowering_survives(method: str, shape: str) -> None:
    every = verdicts(method, shape)
    assert [v for v in every if v.survives] == []
    assert sum(v.truth == "wrong" for v in every) >= 3
    assert sum(v.truth == "fails" for v in every) >= 3
    assert sum(v.truth == "same" for v in every) >= 3


def test_every_kind_of_mutant_changes_a_number_somewhere() -> None:
    every = [v for program in SAMPLE for v in verdicts(*program)]
    assert {v.operator for v in every} == {v.operator for v in every if v.truth != "same"}


@pytest.mark.parametrize(
    ("blind", "kinds"),
    [
        ("assert_lowered", {"drop an ordering edge", "skip an instruction", "run an instruction twice"}),
        ("assert_side_by_side", {"pass nothing", "send twice"}),
    ],
)
def test_a_blind_assertion_leaves_survivors(
    blind: str, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, blind, lambda *_, **__: None)
    program = found("by hand", "kept")
    assert program is not None
    judge = Judge(program)
    every = [judge.judge(site) for site in lowering.sites(judge) if site.operator in kinds]
    assert {v.operator for v in every if v.survives} == kinds


def test_the_command_fails_where_a_mutant_of_the_lowering_survives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = Mutant("bp", "chain", "swap", "here", Truth.SAME, (), ACCEPTED, "", NOTHING, "")
    lost = Verdict("bp", "chain", "skip an instruction", "Update 3 of 0", "wrong")
    monkeypatch.setattr(run, "collect", lambda *_: Result([sound]))
    monkeypatch.setattr("sys.argv", ["mutants"])
    for verdicts, code in (([], 0), ([replace(lost, killed=True)], 0), ([lost], 1)):
        monkeypatch.setattr(run, "lower", lambda *_, verdicts=verdicts: verdicts)
        assert run.main() == code
    assert "SURVIVOR bp / chain / skip an instruction / Update 3 of 0" in capsys.readouterr().out
