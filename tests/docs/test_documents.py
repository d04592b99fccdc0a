"""The code in the documents runs as it stands, and does what they say."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from features_replay import FeaturesReplay
from formulas import batches
from torch import nn
from torch.nn import functional as F

import locc
import locc.rewrite
import support
from locc.ir import TrainingGraph
from locc.testing import CONFORMANCE_MODELS, assert_lowered

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("writing_a_method", "methods_in_time")}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, flags=re.S) for name, text in PAGES.items()}
FILES = {
    found[1]: block
    for blocks in BLOCKS.values()
    for block in blocks
    if (found := re.match(r"# (\w+)\.py\n", block))
}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what the pages call files be importable."""
    for name, source in FILES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in FILES:
        sys.modules.pop(name, None)


def method(name: str, title: str, **options: Any) -> locc.Method:
    return getattr(importlib.import_module(name), title)(**options)


def run(page: str, number: int) -> dict[str, Any]:
    """Run one of the blocks of a page that are no files; return what it defines."""
    lines = [block for block in BLOCKS[page] if block not in FILES.values()][number]
    space: dict[str, Any] = {}
    exec(compile(lines, f"<{page}>", "exec"), space)
    return space


@pytest.mark.parametrize("name", FILES)
def test_a_whole_method_takes_under_80_lines(name: str) -> None:
    assert len(FILES[name].splitlines()) < 80


def test_every_verb_is_on_the_page() -> None:
    page = PAGES["writing_a_method"]
    own = vars(TrainingGraph)
    verbs = {n for n, f in own.items() if inspect.isfunction(f) and not n.startswith("_")} - {
        "making",
        "tidy",
    }
    assert [n for n in sorted(verbs) if f"ir.{n}(" not in page] == []
    types = {"Activation", "Given", "LossLike", "Method", "Pass"}
    public = set(locc.rewrite.__all__) - types - {"apply", "configure", "options"}
    assert [n for n in sorted(public) if f"`{n}`" not in page] == []


def test_the_method_of_the_guide_trains(capsys: pytest.CaptureFixture[str]) -> None:
    space = run("writing_a_method", 0)
    program, report, x, y = (space[name] for name in ("program", "report", "x", "y"))
    first = report.objectives
    assert set(first) == {"1.layer_1", "3.layer_3", "4.loss"}
    last = [program.step(x, y) for _ in range(100)][-1].objectives
    assert all(last[name] < first[name] for name in first)
    assert "objective(head_loss)" in capsys.readouterr().out


def test_the_method_of_the_guide_is_dgl_with_a_bare_projection() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    model = support.mlp().double()
    program = locc.compile(
        model, method("mono_forward", "MonoForward"), ["relu1"], example_inputs=x, optimizer=support.sgd()
    )
    matrix = program.root.aux["relu1_relu1"].weight.detach().clone()
    first = nn.Linear(4, 8).double()
    first.load_state_dict(model.first.state_dict())
    m = matrix.clone().requires_grad_()
    nn.functional.cross_entropy(torch.relu(first(x)) @ m.T, y).backward()
    program.step(x, y)
    torch.testing.assert_close(model.first.weight, first.weight - 0.1 * first.weight.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        program.root.aux["relu1_relu1"].weight, matrix - 0.1 * m.grad, rtol=0, atol=1e-10
    )


def test_the_recipe_and_the_advice_of_the_guide_are_taken() -> None:
    careful = method("careful", "Careful")
    with pytest.warns(locc.LoccWarning, match="'Careful' may train badly: the network has no normalisation"):
        program = locc.compile(support.mlp(), careful, ["relu1"], example_inputs=torch.randn(5, 4))
    groups = [g for o in program.optimizers.values() for g in o.param_groups]
    assert {(g["lr"], g["momentum"]) for g in groups} == {(0.1, 0.9)}


def test_a_model_that_the_method_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(locc.MethodError, match=r"it predicts f32\[B,4,11\], not one row of class scores"):
        locc.compile(
            support.Tied(), method("mono_forward", "MonoForward"), ["mid"], tied="copy", example_inputs=x
        )


def test_the_tests_of_the_guide_pass() -> None:
    space = run("writing_a_method", 1)
    space["test_its_plan_means_its_graph"]()
    # The guide's own call takes half a minute: every check on six kinds of models.
    models, checks = {"mlp": CONFORMANCE_MODELS["mlp"]}, ["modules are local", "training resumes"]
    space["assert_conforms"] = partial(space["assert_conforms"], models=models, checks=checks)
    space["test_it_conforms"]()


def test_random_codes_are_descended_as_the_guide_says() -> None:
    x, y = support.batch(dtype=torch.float64)
    model = support.mlp().double()
    program = support.compiled(model, method("drtp", "DRTP"), ["relu1"], optimizer=support.sgd())
    matrix, before = program.root.aux["codes_relu1"].matrix, model.first.weight.detach().clone()
    slope = -matrix[y] / len(y) * (model.first(x) > 0)
    program.step(x, y)
    torch.testing.assert_close(model.first.weight, before - 0.1 * slope.T @ x, rtol=0, atol=1e-10)


def test_the_methods_in_time_run() -> None:
    programs = run("methods_in_time", 0)["programs"]
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    for program in programs.values():
        assert program.certificate.complete
        for phase in [p.name for p in program.phases] or [None]:
            program.phase = phase
            assert_lowered(program, x, y)


def _program(name: str, title: str, **options: Any) -> locc.Program:
    chosen = method(name, title, **options)
    return support.compiled(support.mlp().double(), chosen, ["relu1", "relu2"], optimizer=support.sgd())


def test_a_running_mean_is_kept_and_pulled() -> None:
    program, (x, y) = _program("steady", "Steady", rate=0.2), support.batch(dtype=torch.float64)
    mean = torch.full((8,), 0.5, dtype=torch.float64)
    for i in range(3):
        mean = mean + 0.2 * (torch.relu(program.model.first(x + i)).mean(0) - mean)
        found = program.step(x + i, y).objectives["relu1.level"]
        assert abs(found - (mean - 0.5).square().sum()) < 1e-10


def test_late_gradients_are_those_of_features_replay() -> None:
    program, other = _program("late", "Late"), support.mlp().double()
    other.load_state_dict(program.model.state_dict())
    replay = support.compiled(other, FeaturesReplay(), ["relu1", "relu2"], optimizer=support.sgd())
    moved = []
    for x, y in batches(5, 6, 4, 3):
        before = support.snapshot(program.model)
        program.step(x, y)
        replay.step(x, y)
        after = program.model.state_dict()
        moved.append({n.split(".")[0] for n in before if not torch.equal(before[n], after[n])})
    assert moved[:3] == [{"third"}, {"second", "third"}, {"first", "second", "third"}]
    assert support.same(program.model.state_dict(), other.state_dict())


def test_inner_steps_lead_to_the_target() -> None:
    program, (x, y) = _program("inner_steps", "InnerTargets"), support.batch(dtype=torch.float64)
    head, h = program.root.aux["relu1_head_relu1"], torch.relu(program.model.first(x)).detach()
    z = h.clone()
    for _ in range(3):
        leaf = z.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(head(leaf), y), leaf)
        z = (leaf - slope).detach()
    found = program.step(x, y).objectives["relu1.target"]
    assert abs(found - (h - z).square().sum() / len(x)) < 1e-10


def test_a_cascade_trains_one_module_after_the_other() -> None:
    program, batch = _program("cascade", "Cascade", passes_each=1), support.batch(dtype=torch.float64)
    history = program.fit([batch], epochs=2, progress=False)
    assert [e.phase for e in history.epochs] == [
        f"train_{m.name}" for m in program.ir.modules for _ in range(2)
    ]
    before = support.snapshot(program.model)
    program.phase = "train_relu2"
    program.step(*batch)
    after = program.model.state_dict()
    assert {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])} == {"second"}


def test_the_heads_vote_at_inference() -> None:
    program, (x, _) = _program("voting", "Voting"), support.batch(dtype=torch.float64)
    program.eval()
    model, aux = program.model, program.root.aux
    one = torch.relu(model.first(x))
    two = torch.relu(model.second(one))
    scores = [model.third(two), aux["relu1_head_relu1"](one), aux["relu2_head_relu2"](two)]
    wanted = torch.stack([s.softmax(-1) for s in scores]).mean(0)
    torch.testing.assert_close(program(x).exp(), wanted, rtol=0, atol=1e-10)
