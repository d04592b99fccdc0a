"""The command line: what each command prints, and with which code it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import locc
from locc.cli import app
from locc.commands.loading import load_model, splits_of

MODEL = f"{Path(__file__).parent / 'sample.py'}"
MLP = [f"{MODEL}:mlp", "--splits", "2,4"]
DIGITS = ["--data", "digits"]
QUIET = ["--no-progress"]


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_help_lists_the_commands() -> None:
    text = run("--help").output
    assert all(name in text for name in ("methods", "inspect", "train", "verify", "export", "reproduce"))


def test_the_version_is_told_by_itself() -> None:
    assert run("--version").output == f"locc {locc.__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "locc", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"locc {locc.__version__}\n"


def test_a_command_alone_says_what_it_lacks() -> None:
    assert "Missing argument 'MODEL'" in run("train", code=2).output


def test_help_of_a_command_lists_the_options_of_its_method() -> None:
    assert "--sigma" in run("train", "--help", "--method", "dtp").output
    assert "takes no options of its own" in run("train", "--help", "--method", "bp").output
    assert "`locc methods dtp`" in run("train", "--help").output


@pytest.mark.parametrize(
    "command",
    [["train", *DIGITS, *QUIET, "--epochs", "0"], ["verify"], ["export", "--onnx", "m.onnx", "--no-check"]],
    ids=lambda command: command[0],
)
def test_cache_keeps_what_capture_has_shown(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCC_CACHE", str(tmp_path / "kept"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("locc.program.Program.export_onnx", lambda *_, **__: "m.onnx")
    given = [command[0], *MLP, *command[1:], *([] if DIGITS[0] in command else ["--input-shape", "64"])]
    run(*given)
    assert not (tmp_path / "kept").exists()
    run(*given, "--cache")
    assert len(list((tmp_path / "kept").glob("*.json"))) == 1


def test_methods() -> None:
    text = run("methods").output
    assert "bp" in text
    assert "dgl" in text
    details = run("methods", "dgl").output
    assert "--head" in details
    assert "proxy" in details
    assert "nearest: 'dgl'" in run("methods", "dglx", code=2).stderr


def test_inspect() -> None:
    text = run("inspect", *MLP, *DIGITS, "--method", "dgl", "--ir").output
    assert "compiles" in text
    assert "f32[B,32]" in text
    assert "def step(" in text
    assert "2,080" in text  # 64 * 32 + 32 parameters


def test_inspect_tells_why_not() -> None:
    text = run("inspect", f"{MODEL}:mlp", "--splits", "layer", *DIGITS, code=1).output
    assert "split 'layer' matches no submodule" in text
    assert "SmallCNN" not in text


def test_inspect_with_several_inputs() -> None:
    text = run("inspect", f"{MODEL}:Pair", "-s", "left", "--input-shape", "4", "--input-shape", "3").output
    assert "compiles" in text


def test_inspect_with_dimensions_that_vary() -> None:
    asked = ["inspect", f"{MODEL}:steps", "-s", "1,", "--input-shape", "5,4"]
    assert "f32[B,5,6]" in run(*asked).output
    assert "f32[B,T,6]" in run(*asked, "--dynamic").output


def test_train_learns_the_digits(tmp_path: Path) -> None:
    onnx = tmp_path / "m.onnx"
    saved = tmp_path / "m.safetensors"
    result = run(
        "train", *MLP, *DIGITS, "--method", "dgl", "--epochs", "8", *QUIET,
        "--save", str(saved), "--onnx", str(onnx),
    )  # fmt: skip
    line = next(text for text in result.output.splitlines() if text.startswith("validation:"))
    assert float(line.rpartition(" ")[2].rstrip("%")) > 90.0
    assert "objectives, mean of epoch 8" in result.output
    assert (
        "trains with SGD(lr=0.1, momentum=0.9, weight_decay=0.0005) (Belilovsky et al. 2020" in result.output
    )
    assert onnx.is_file()
    assert saved.is_file()

    exported = tmp_path / "again.onnx"
    run("export", *MLP, *DIGITS, "--method", "dgl", "--checkpoint", str(saved), "--onnx", str(exported))
    assert exported.is_file()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lr", "0.0003"], "trains with RMSprop(lr=0.0003) (Nøkland 2016, "),
        (["--optimizer", "momentum"], "trains with SGD(lr=0.001, momentum=0.9) (--optimizer)"),
        (["--optimizer", "adamw", "--lr", "0.01"], "trains with AdamW(lr=0.01) (--optimizer)"),
    ],
)
def test_the_flags_override_the_recipe(flags: list[str], told: str) -> None:
    result = run("train", *MLP, *DIGITS, "--method", "dfa", "--epochs", "0", *QUIET, *flags)
    assert told in result.output
    assert "warning: method 'dfa' may train badly: the network has ReLUs" in result.stderr


def test_features_of_a_sequential_training_are_kept(tmp_path: Path) -> None:
    asked = ["train", *MLP, *DIGITS, *QUIET, "--method", "dgl", "--epochs", "2", "--features", str(tmp_path)]
    result = run(*asked, "--schedule", "sequential", "--features-limit", "1MB")
    assert result.output.count("features reused: 98%") == 2  # whole batches, shuffled: others are left over
    assert "none rests; use schedule='sequential'" in run(*asked, code=1).output


def test_the_seed_decides_the_run() -> None:
    command = ["train", *MLP, *DIGITS, "--epochs", "1", *QUIET]
    assert validation(*command, "--seed", "1") == validation(*command, "--seed", "1")
    assert validation(*command, "--seed", "1") != validation(*command, "--seed", "2")


def validation(*command: str) -> str:
    return next(text for text in run(*command).output.splitlines() if text.startswith("validation:"))


def test_method_options_reach_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def examine(*_: Any, **options: Any) -> locc.Examination:
        seen.update(options)
        return locc.Examination("M", "dtp", complete=True)

    monkeypatch.setattr("locc.examine", examine)
    run("inspect", "--sigma", "0.25", *MLP, *DIGITS, "--method", "dtp", "--lr-scale=2")
    assert (seen["sigma"], seen["lr_scale"]) == (0.25, 2.0)


def test_resume_goes_on_where_it_stopped(tmp_path: Path) -> None:
    saved = tmp_path / "c"
    run("train", *MLP, *DIGITS, "--epochs", "1", *QUIET, "--save", str(saved))
    text = run(
        "train", *MLP, *DIGITS, "--epochs", "1", *QUIET, "--resume", str(saved), "--save", str(saved)
    ).output
    assert "saved" in text
    error = run("train", *MLP, *DIGITS, "--resume", str(tmp_path / "none"), code=1).stderr
    assert "CheckpointError" in error


@pytest.mark.slow
def test_of_several_processes_one_speaks(tmp_path: Path) -> None:
    saved = tmp_path / "saved.safetensors"
    common = [
        "-m",
        "locc",
        "train",
        *MLP,
        *DIGITS,
        *QUIET,
        "--method",
        "dgl",
        "--epochs",
        "1",
        "--save",
        str(saved),
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for more in ([], ["--resume", str(saved)]):
        command = [*launcher, *common, "--schedule", "pipelined", "--onnx", str(tmp_path / "m.onnx"), *more]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert [told.count(word) for word in ("trains with", "saved ", "exported ", "\ntraining: ")] == [
            1,
            1,
            1,
            1,
        ]
    run("train", *MLP, *DIGITS, *QUIET, "--method", "dgl", "--epochs", "0", "--resume", str(saved))


def test_ctrl_c_leaves_a_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "c"
    command = ["train", *MLP, "--data", f"{MODEL}:interrupting", *QUIET, "--save", str(saved)]
    text = run(*command, code=130).output
    assert "interrupted after 3 steps" in text
    program = locc.compile(
        load_model(f"{MODEL}:mlp")[0], "bp", ["2", "4"], example_inputs=torch.randn(4, 64), verify=False
    )
    program.load(saved)
    assert program.steps == 3


def test_data_of_a_factory() -> None:
    for name in ("loader", "loaders"):
        text = run("train", *MLP, "--data", f"{MODEL}:{name}", "--epochs", "1", *QUIET).output
        assert ("validation:" in text) == (name == "loaders")


def test_export(tmp_path: Path) -> None:
    onnx, folder = tmp_path / "m.onnx", tmp_path / "parts"
    run("export", *MLP, "--input-shape", "64", "--onnx", str(onnx), "--modules", str(folder))
    assert onnx.is_file()
    assert (folder / "manifest.json").is_file()
    missing = run("export", *MLP, "--input-shape", "64", "--onnx", str(tmp_path / "no" / "m.onnx"), code=1)
    assert "ExportError" in missing.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", *MLP], "nothing to train on"),
        (["train", f"{MODEL}:mlpx", *DIGITS], "holds no 'mlpx'"),
        (["train", "nowhere.at_all:mlp", *DIGITS], "there is no module 'nowhere'"),
        (["train", "nowhere.py:mlp", *DIGITS], "there is no file 'nowhere.py'"),
        (["train", MODEL, *DIGITS], "write package.module:name"),
        (["train", f"{MODEL}:number", *DIGITS], "gives a int"),
        (["train", *MLP, *DIGITS, "--method", "none"], "there is no method 'none'"),
        (
            ["train", *MLP, *DIGITS, "--method", "dgl", "--sigma", "1"],
            "(--help lists all). Method 'dgl' takes\n  --head",
        ),
        (
            ["train", *MLP, *DIGITS, "--method", "bp", "--save-to", "x"],
            "no option --save-to; nearest: '--save'",
        ),
        (["train", *MLP, *DIGITS, "--sigma", "1"], "Method 'bp' takes no options"),
        (["train", *MLP, *DIGITS, "--method", "dtp", "--sigma", "much"], "--sigma much: expected FLOAT"),
        (["train", *MLP, *DIGITS, "--method", "dtp", "--sigma"], "--sigma needs a value"),
        (["train", *MLP, *DIGITS, "--optimizer", "adan"], "nearest: 'adam'"),
        (["train", *MLP, *DIGITS, "--save", "/nowhere/at/all"], "does not exist"),
        (["train", *MLP, *DIGITS, "--device", "gpu"], "--device gpu"),
        (["train", *MLP, *DIGITS, "--set", "bakend=inductor"], "nearest: 'backend'"),
        (["train", *MLP, *DIGITS, "--set", "backend"], "give NAME=VALUE"),
        (["train", *MLP, *DIGITS, "--set", "clip=1"], "give --clip"),
        (["train", *MLP, *DIGITS, "--set", "model=x"], "give NAME=VALUE"),
        (["train", *MLP, *DIGITS, "--set", "example_inputs=1"], "give NAME=VALUE"),
        (["train", *MLP, "--data", f"{MODEL}:number"], "must give a DataLoader"),
        (["inspect", *MLP], "give --input-shape"),
        (["inspect", *MLP, "--input-shape", "a"], "--input-shape a"),
        (["inspect", *MLP, "--input-shape", "63", *DIGITS], "64 pixels"),
        (["inspect", *MLP, "--input-shape", "64", "--input-dtype", "f32"], "--input-dtype f32"),
        (["export", *MLP, "--input-shape", "64"], "nothing to write"),
    ],
)
def test_misuse_is_told_in_one_message(args: list[str], message: str) -> None:
    result = run(*args, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output + result.stderr


def test_errors_are_told_without_a_traceback() -> None:
    error = run("train", f"{MODEL}:broken", *DIGITS, code=1).stderr
    assert "KeyError: 'no such weights' (--debug shows where)" in error
    refused = run("train", f"{MODEL}:mlp", *DIGITS, "--splits", "layer", code=1).stderr
    assert "error: SplitError: split 'layer'" in refused


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(KeyError):
        CliRunner().invoke(app, ["train", f"{MODEL}:broken", *DIGITS, "--debug"], catch_exceptions=False)


def test_an_instance_and_a_class_will_do() -> None:
    assert "compiles" in run("inspect", f"{MODEL}:instance", "-s", "2,4", *DIGITS).output


def test_splits() -> None:
    assert splits_of("3") == 3
    assert splits_of("3,") == ["3"]
    assert splits_of("a, b.*") == ["a", "b.*"]
    assert splits_of("") == []
    assert splits_of("2GiB", 64) == locc.fit(memory="2GiB", batch=64)


def test_further_arguments_of_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    compile = locc.compile

    def noted(*args: Any, **options: Any) -> locc.Program:
        given.update(options)
        return compile(*args, **options)

    monkeypatch.setattr(locc, "compile", noted)
    run(
        "train",
        *MLP,
        *DIGITS,
        *QUIET,
        "--epochs",
        "0",
        "--set",
        "accumulate=2",
        "--set",
        "update = after_backward",
    )
    assert (given["accumulate"], given["update"]) == (2, "after_backward")


def test_models_are_found_in_the_working_directory(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(
        "from torch import nn\nnet = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))\n"
    )
    command = [
        sys.executable,
        "-m",
        "locc.cli",
        "inspect",
        "mine.models:net",
        "-s",
        "0,",
        "--input-shape",
        "4",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "compiles" in result.stdout
