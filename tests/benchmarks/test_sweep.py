"""The machinery of the sweep, on models that need none of its libraries."""

from __future__ import annotations

import json
import os
import time

import pytest
from torch import nn, randint, randn

from benchmarks.sweep.__main__ import main
from benchmarks.sweep.entries import EXPORT, AbsentError, Entry, Record, Results, Sample
from benchmarks.sweep.pool import Limits, Trial, run
from benchmarks.sweep.trial import attempt


def tiny():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)), nn.Linear(8, 3))
    return Sample(model, randn(2, 8), randint(0, 3, (2,)))


def absent():
    raise AbsentError("no such model")


def entry(name, find=lambda: tiny, glob=None):
    return Entry("here", "family", name, find, glob)


def act(entry, make, method, splits, export):
    """Do what the entry is called, at method "bp"; others work."""
    does = entry.name if method == "bp" else "work"
    if does == "sleep":
        time.sleep(60)
    if does == "exit":
        os._exit(3)
    if does == "fill":
        bytearray(2**30)
    outcome = {"refuse": "refused", "wreck": "broken", "full": "memory"}.get(does, "ok")
    yield Record(entry.key, entry.family, method, splits, outcome, facts={"process": os.getpid()})
    if export and outcome == "ok":
        time.sleep(60)


def outcomes(trial, **limits):
    found = [r for records in run([trial], act, 1, Limits(seconds=6, memory=0.25, **limits)) for r in records]
    return found, {r.method: r.outcome for r in found}


@pytest.mark.parametrize(
    ("name", "export", "expected", "after"),
    [
        ("refuse", True, {"bp": "refused"}, "ok"),
        ("sleep", False, {"bp": "time"}, "ok"),
        ("work", True, {"bp": "ok", EXPORT: "time"}, "ok"),
        ("exit", True, {"bp": "crash"}, "ok"),
        ("fill", False, {"bp": "memory"}, "ok"),
        ("full", True, {"bp": "memory"}, "ok"),
        ("wreck", True, {"bp": "broken"}, "broken"),
        ("absent", False, {"bp": "absent"}, "absent"),
    ],
)
def test_what_becomes_of_a_method_and_of_those_after_it(name, export, expected, after):
    trial = Trial(entry(name, absent if name == "absent" else lambda: tiny), ["bp", "al", "dgl"], 2, export)
    found, told = outcomes(trial)
    assert told == expected | {"al": after, "dgl": after}
    assert len(found) == len(told)


def test_a_process_takes_all_methods():
    found, _ = outcomes(Trial(entry("work"), ["bp", "al", "dgl"], 2))
    assert len({r.facts["process"] for r in found}) == 1


def test_a_spent_budget_starts_nothing():
    assert outcomes(Trial(entry("work"), ["bp"], 2), budget=0)[1] == {}


def test_a_budget_that_runs_out_ends_a_trial_after_the_method_under_way():
    def slow(*arguments):
        time.sleep(0.2)
        yield from act(*arguments)

    found = run([Trial(entry("work"), ["bp", "al", "dgl"], 2)], slow, 1, Limits(budget=0.1))
    assert [r.method for records in found for r in records] == ["bp"]


def test_a_method_on_a_model():
    (done,) = attempt(entry("tiny"), tiny, "dgl", 2, export=False)
    assert (done.outcome, done.facts["modules"]) == ("ok", 2)
    (refused,) = attempt(entry("tiny"), tiny, "bp", 9, export=False)
    assert refused.outcome == "refused"
    assert "splits=9" in refused.text
    (broken,) = attempt(entry("tiny"), lambda: 1 / 0, "bp", 2, export=False)
    assert broken.outcome == "broken"
    named = Entry("here", "family", "tiny", lambda: tiny, "layers.*|[0-2]")
    (done,) = attempt(named, tiny, "dgl", str(named.glob), export=False)
    assert done.facts["modules"] == 4


def test_a_run_resumes_and_is_reported(tmp_path, monkeypatch):
    models = [entry("work"), entry("refuse"), entry("absent", absent)]
    monkeypatch.setattr("benchmarks.sweep.catalogue.entries", lambda: models)
    monkeypatch.setattr("benchmarks.sweep.trial.attempt", act)
    results, page = tmp_path / "results.jsonl", tmp_path / "models.md"
    arguments = [str(results), "--page", str(page), "--methods", "bp,dgl", "--without-onnx"]
    main([*arguments, "--only", "here/w*", "--methods", "bp"])
    with results.open("a") as file:
        file.write('{"key": "here/refuse", "fam')  # a run that was killed
    main(arguments)
    lines = results.read_text().splitlines()
    found = [json.loads(line)["outcome"] for line in lines if "outcome" in line]
    assert sorted(found) == ["absent", "absent", "ok", "ok", "ok", "refused"]
    main(arguments)
    assert results.read_text().splitlines() == lines
    text = page.read_text()
    assert "| work | family | 0.00 M | 2 |  |" in text
    assert "| refuse | family | 0.00 M | 1 | [r1](#r1): bp |" in text
    assert "- here/absent" in text
    page.unlink()
    main([*arguments, "--report"])
    assert page.read_text() == text


def test_results_of_other_versions_are_kept_apart(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.begin({"torch": "1"}, "command")
    with pytest.raises(ValueError, match="another file"):
        Results(results.path).begin({"torch": "2"}, "command")
