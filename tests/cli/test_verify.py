"""`locc verify` as a gate: 0 where the proof holds, 1 where it does not, 2 for a wrong command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import locc
from locc.proof import sentinel

from .test_cli import MLP, MODEL, run

SHAPE = ("--input-shape", "64")
LOCC = Path(sys.executable).parent / "locc"


def test_it_prints_the_certificate_and_saves_it(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    text = run("verify", *MLP, *SHAPE, "--method", "dgl", "--json", str(path)).output
    certificate = locc.Certificate.from_json(path.read_text())
    assert certificate.verdict == "strictly modular"
    assert certificate.graph_hash in text
    assert "optimizer storage" in text
    assert len(text.splitlines()) <= 20
    assert "module 0: 2" in run("verify", *MLP, *SHAPE, "--method", "dgl", "--verbose").output


def test_a_dash_is_standard_output_and_the_rest_goes_to_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("verify", *MLP, *SHAPE, "--method", "dgl", "--json", "-")
    assert locc.Certificate.from_json(result.stdout).verdict == "strictly modular"
    assert "optimizer storage" in result.stderr
    assert not list(tmp_path.iterdir())


def test_with_data_the_checks_see_a_real_target() -> None:
    assert "target: the given target" in run("verify", *MLP, "--data", "digits", "--method", "dgl").output


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    written = set()
    for name in ("one.json", "two.json"):
        run("verify", *MLP, *SHAPE, "--json", str(tmp_path / name))
        written.add((tmp_path / name).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("factory", ["with_inputs", "Carrying"])
def test_a_model_may_bring_its_example_inputs(factory: str) -> None:
    assert (
        "Certificate of locality: dgl"
        in run("verify", f"{MODEL}:{factory}", "--splits", "2,4", "--method", "dgl").output
    )


def test_a_leak_fails_with_one_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    result = run("verify", f"{MODEL}:leaky", "-s", "a,b", *SHAPE, "-m", "dgl", "--json", str(path), code=1)
    assert "objective 'b.loss' of 'b' reaches parameter 'a.weight', which module 'a' owns" in result.stderr
    assert not path.exists()


def test_an_unfinished_check_fails_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = sentinel.Sentinel(failure="the optimizer of '2' fails: ValueError")
    monkeypatch.setattr(sentinel, "check", lambda *_: unfinished)
    result = run("verify", *MLP, *SHAPE, "-m", "dgl", code=1)
    assert "a check could not be completed, so nothing is proved" in result.stderr
    assert "the optimizer of '2' fails" in result.stderr


@pytest.mark.parametrize(
    ("method", "require", "code"),
    [("dgl", "strict", 0), ("dgl", "weak", 0), ("dfa", "weak", 0), ("dfa", "strict", 1), ("bp", "weak", 1)],
)
def test_a_verdict_can_be_required(method: str, require: str, code: int) -> None:
    result = run("verify", *MLP, *SHAPE, "-m", method, "--require", require, code=code)
    if code:
        assert f"--require {require}: the program is " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MLP], "the factory return (model, example inputs)"),
        ([*MLP, *SHAPE, "--require", "strickt"], "nearest: 'strict'"),
        ([f"{MODEL}:nothing", *SHAPE], "holds no 'nothing'"),
        (["no_such_package.module:factory", *SHAPE], "there is no module 'no_such_package'"),
        ([f"{MODEL}:number", *SHAPE], "must give a torch.nn.Module"),
    ],
)
def test_misuse_exits_with_two(arguments: list[str], message: str) -> None:
    assert message in run("verify", *arguments, code=2).stderr


def test_the_exit_code_reaches_the_shell() -> None:
    codes = [
        subprocess.run(
            [LOCC, "verify", f"{MODEL}:{name}", "-s", "a,b", "-m", "dgl", *SHAPE],
            capture_output=True,
            check=False,
        ).returncode
        for name in ("leaky", "nothing")
    ]
    assert codes == [1, 2]
