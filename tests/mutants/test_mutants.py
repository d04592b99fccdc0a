"""A sample of the mutants, and what the harness itself is worth; `make mutants` judges them all."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.ir import Inputs, TrainingGraph
from locc.lower import Backward
from locc.proof import Finding, sentinel, static, storage, walk
from mutants import oracle, run
from mutants.edges import _between
from mutants.judge import ACCEPTED, KILLED, OPERATORS, Judge, _holdings
from mutants.oracle import Move, Truth
from mutants.order import CycleError
from mutants.report import Result
from mutants.scalars import _again, _scaled
from mutants.sites import LEARNER, arrange, computes, put_after, uncut
from mutants.subjects import SHAPES, Subject, copied, subject
from mutants.tensors import _assign, _tied
from support import every_method

METHODS = sorted(locc.methods())


def _sample(method: str) -> Subject:
    """Return a method on one shape that it admits; another shape for the next method."""
    start = METHODS.index(method)
    names = list(SHAPES)
    found = (subject(method, names[(start + i) % len(names)]) for i in range(len(names)))
    return next(s for s in found if s is not None)


# ---- the sample ------------------------------------------------------------------------------


QUICK = ("dgl", "fa")
"""One a family or so; `make slow` samples the others, `make mutants` judges all of each method."""


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_no_mutant_survives(method: str) -> None:
    judge = Judge(_sample(method), alone=False)
    # Half of the operators take an objective or a gradient; formulas alone have neither, but more sites.
    each = 1 if judge.program.ir.objectives() else 2
    mutants = [m for name in judge.names(each=each) if (m := judge.judge(*name)) is not None]
    assert sum(m.truth is Truth.LEAK for m in mutants) >= 10
    assert sum(m.outcome == ACCEPTED for m in mutants) >= 5
    assert [str(m) for m in mutants if m.survives] == []
    assert [str(m) for m in mutants if m.false_alarm] == []


UNSEEN_IN_GRAPHS = {"hide another owner's parameter in a layer", *LEARNER}
LIVE = {
    "drop a stop_gradient",
    "stop_gradient -> identity",
    "straight-through around a stop_gradient",
    "reroute an edge to a foreign live value",
    "merge two objectives",
}


def test_the_checks_see_a_leak_independently() -> None:
    found = subject("dgl", "chain")
    assert found is not None
    judge = Judge(found)
    mutants = [m for name in judge.names(each=1) if (m := judge.judge(*name)) is not None]
    alone = {m.operator: m.alone for m in mutants if m.truth is Truth.LEAK}
    assert alone.keys() > LIVE | UNSEEN_IN_GRAPHS
    assert {kind for kind, seen in alone.items() if "reachability" not in seen} == UNSEEN_IN_GRAPHS
    assert all(alone[kind] >= {"walk", "sentinel"} for kind in LIVE)


def test_every_operator_applies_somewhere() -> None:
    judges = [Judge(s) for m, sh in (("altmin", "buffers"), ("dtp", "residual")) if (s := subject(m, sh))]
    assert {name for judge in judges for name, _ in judge.names()} == set(OPERATORS)


# ---- the harness can fail --------------------------------------------------------------------


def _judged(monkeypatch: pytest.MonkeyPatch, blind: dict[Any, Callable[..., Any]]) -> Result:
    found = subject("bp", "chain")
    assert found is not None
    judge = Judge(found, alone=False)
    _ = judge.facts  # of the clean program, by the verifier as it is
    for module, answer in blind.items():
        monkeypatch.setattr(module, "check", answer)
    verdicts = [judge.judge(*name) for name in judge.names(each=1)]
    return Result([m for m in verdicts if m is not None], programs=1)


BLIND: dict[Any, Callable[..., Any]] = {
    static: lambda *_, **__: [],
    walk: lambda *_, **__: walk.Walk(),
    sentinel: lambda *_, **__: sentinel.Sentinel(),
    storage: lambda *_, **__: [],
}


def test_a_blind_verifier_leaves_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _judged(monkeypatch, BLIND)
    lost = {m.operator for m in result.of(Truth.LEAK) if m.survives}
    assert len(lost) >= 15
    assert {"merge two objectives", "tie two owners' parameters", "optimizer: a foreign parameter"} <= lost


@pytest.mark.parametrize("seeing", BLIND)
def test_no_check_is_enough_alone(monkeypatch: pytest.MonkeyPatch, seeing: Any) -> None:
    result = _judged(monkeypatch, {m: answer for m, answer in BLIND.items() if m is not seeing})
    killed = [m for m in result.of(Truth.LEAK) if m.outcome == KILLED]
    assert 0 < len(killed) < len(result.of(Truth.LEAK))
    assert result.survivors


def test_a_verifier_that_refuses_everything_raises_false_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _judged(monkeypatch, {static: lambda *_: [Finding("mutant", "anything")]})
    assert result.false_alarms
    assert all(m.named == "nothing" for m in result.mutants)
    assert result.survivors  # a refusal that names nothing proves nothing


def test_the_command_fails_where_a_mutant_survives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _judged(monkeypatch, BLIND)
    monkeypatch.setattr(run, "collect", lambda *_: result)
    monkeypatch.setattr(run, "lower", lambda *_: [])
    monkeypatch.setattr("sys.argv", ["mutants"])
    assert run.main() == 1
    assert "SURVIVOR bp / chain / merge two objectives / " in capsys.readouterr().out
    result.mutants = [m for m in result.mutants if not m.survives]
    assert run.main() == 0
    result.mutants = []
    assert run.main() == 1


# ---- the oracle ------------------------------------------------------------------------------


def test_the_oracle_knows_neither_the_verifier_nor_the_lowering() -> None:
    for name in ("oracle", "order"):
        tree = ast.parse((Path(oracle.__file__).parent / f"{name}.py").read_text())
        modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        ours = {m for m in modules if m.startswith(("locc", "tests", "mutants"))}
        assert ours <= {"locc.ir", "locc.ir.state"}


def _tensors(found: Subject) -> list[Tensor]:
    return found.program.ir.captured.signature.bind(Inputs.of(found.program.model, found.x))


@pytest.mark.parametrize("shape", ["chain", "convolutional", "language", "two inputs"])
@pytest.mark.parametrize("method", every_method())
def test_the_oracle_sees_the_gradients_of_a_real_step(
    method: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = subject.__wrapped__(method, shape)
    if found is None or not found.program.ir.objectives():
        return  # the method refuses the model, so that there is no such program, or has no gradients
    for draw in ("randn_like", "rand_like"):  # the two draw their noise from other streams
        monkeypatch.setattr(torch, draw, torch.ones_like)
    monkeypatch.setattr(torch, "randint", lambda _, size, **__: torch.zeros(size, dtype=torch.long))
    monkeypatch.setattr(nn.functional, "dropout", lambda x, *_, **__: x)
    seen = oracle.run(found.program.ir, _tensors(found), found.y, 0, draw=False, dtype=torch.float32)
    parameters = dict(found.program.root.named_parameters())
    trained: dict[str, Tensor] = {}

    def observe(instruction: Any, _: Any) -> None:
        if isinstance(instruction, Backward):
            trained.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    found.program.built.executor.observe = observe
    found.program.step(found.x, found.y)
    assert trained
    torch.testing.assert_close(seen.training(), trained)


@pytest.mark.parametrize("shape", ["residual", "plain", "custom function"])
def test_the_oracle_of_bp_is_backpropagation(shape: str) -> None:
    found = subject("bp", shape)
    assert found is not None
    ir = copied(found.program.ir)
    for module in ir.root.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    seen = oracle.run(ir, _tensors(found), found.y, 0, draw=False)
    ir.root.double()
    ir.loss_function(ir.root.model(found.x.double()), found.y).backward()
    wanted = {n: p.grad for n, p in ir.root.named_parameters()}
    torch.testing.assert_close(seen.training(), wanted, rtol=1e-10, atol=1e-12)


def _dgl() -> tuple[Judge, TrainingGraph]:
    """Three layers with a head each; nothing is read twice, so every leak has one way."""
    found = subject("dgl", "chain")
    assert found is not None
    return Judge(found), copied(found.program.ir)


def _truth(judge: Judge, ir: TrainingGraph) -> tuple[Truth, list[Move]]:
    arrange(ir)
    return judge._truth(ir, judge._learners(ir))


def _cut(ir: TrainingGraph, consumer: str) -> Any:
    return ir.boundaries(consumer=consumer)[0].entry


def test_the_oracle_measures_a_leak_as_autograd_does() -> None:
    judge, ir = _dgl()
    uncut(ir, _cut(ir, "1"))
    truth, moves = _truth(judge, ir)
    assert truth is Truth.LEAK
    assert moves == [Move("1", "model.0.0.weight", "gradient"), Move("1", "model.0.0.bias", "gradient")]
    seen = oracle.run(ir, judge.tensors, judge.subject.y, 0, draw=False)
    root = ir.root.double()
    one, two = root.get_submodule("model.0"), root.get_submodule("model.1")
    hidden = two(one(judge.subject.x.double()))
    head = next(str(n.target) for n in ir.nodes("1") if str(n.target).startswith("aux."))
    loss = nn.functional.cross_entropy(root.get_submodule(head)(hidden), judge.subject.y)
    (wanted,) = torch.autograd.grad(loss, root.get_parameter("model.0.0.weight"))
    torch.testing.assert_close(seen.gradients["1", "model.0.0.weight"], wanted, rtol=1e-12, atol=1e-14)


def test_the_oracle_calls_a_scaled_objective_changed_and_a_copied_value_the_same() -> None:
    judge, ir = _dgl()
    put_after(ir, _cut(ir, "1"), torch.clone)
    assert _truth(judge, ir) == (Truth.SAME, [])
    before = judge.clean[0].training()
    _scaled(ir, ir.objectives("1")[0])
    assert _truth(judge, ir) == (Truth.CHANGED, [])
    after = judge._run(ir, 0).training()
    torch.testing.assert_close(after["model.1.0.weight"], -2 * before["model.1.0.weight"])
    assert torch.equal(after["model.0.0.weight"], before["model.0.0.weight"])


def test_a_gradient_that_is_zero_everywhere_is_no_leak_to_the_oracle() -> None:
    judge, ir = _dgl()
    cut = _cut(ir, "1")
    put_after(ir, cut, lambda x, live: x + torch.relu(live.sigmoid() - 2), cut.args[0])
    assert _truth(judge, ir) == (Truth.SAME, [])
    with pytest.raises(locc.LocalityError):
        judge._verify(ir, judge._learners(ir))


def test_the_oracle_sees_a_double_owner() -> None:
    judge, ir = _dgl()
    _again(ir, ir.objectives("0")[0].args[0], "2", 1.0)  # type: ignore[arg-type]
    truth, moves = _truth(judge, ir)
    assert truth is Truth.LEAK
    assert Move("2", "model.0.0.weight", "gradient") in moves


@pytest.mark.parametrize(
    ("tie", "how"),
    [(lambda p: p, "gradient"), (lambda p: nn.Parameter(p.detach()), "shared memory")],
    ids=["tied", "view"],
)
def test_the_oracle_sees_one_memory_with_two_owners(tie: Any, how: str) -> None:
    judge, ir = _dgl()
    _tied(ir, "model.0.0.bias", "model.1.0.bias", tie)
    moves = _truth(judge, ir)[1]
    assert {m.path for m in moves} <= {"model.0.0.bias", "model.1.0.bias"}
    assert {m.by for m in moves if m.how == how} == {"0", "1"}


def test_the_oracle_sees_what_optimizers_and_assignments_move() -> None:
    judge, ir = _dgl()
    foreign = ir.root.get_parameter("model.0.0.bias")
    learners = judge._learners(ir)
    learners["1"].parameters.append(foreign)
    assert judge._truth(ir, learners)[1] == [Move("1", "model.0.0.bias", "clipping and clearing")]
    learners = judge._learners(ir)
    view = nn.Parameter(foreign.detach())
    learners["1"].optimizer.add_param_group({"params": [view]})
    assert judge._truth(ir, learners)[1] == [Move("1", "model.0.0.bias", "optimizer")]
    _assign(ir, "1", "model.0.0.bias", "0")
    assert _truth(judge, ir)[1] == [Move("1", "model.0.0.bias", "assignment")]
    _, ir = _dgl()
    _assign(ir, "1", "model.1.0.bias", "1")
    assert _truth(judge, ir) == (Truth.CHANGED, [])


def test_the_oracle_runs_a_region_as_often_as_it_says() -> None:
    found = subject("altmin", "chain")
    assert found is not None
    ir, tensors = copied(found.program.ir), _tensors(found)
    times = {name: region.times for name, region in ir.repeats.items()}
    assert set(times.values()) == {5}
    turns: list[int] = []
    node = next(n for n in ir.graph.nodes if n.name == "code")
    computes(node, _counting(node.target, turns))
    oracle.run(ir, tensors, found.y, 0)
    assert len(turns) == 5


def _counting(function: Any, turns: list[int]) -> Callable[..., Any]:
    def count(*args: Any) -> Any:
        turns.append(1)
        return function(*args)

    return count


def test_a_circle_is_no_program() -> None:
    _, ir = _dgl()
    written = [n.name for n in ir.graph.nodes]
    arrange(ir)
    assert [n.name for n in ir.graph.nodes] == written
    layer = ir.boundaries(consumer="2")[0].value
    _between(ir, layer, layer.all_input_nodes[0], torch.add, layer, layer)
    with pytest.raises(CycleError):
        arrange(ir)


# ---- what mutants taught the first check -----------------------------------------------------


def test_reachability_sees_a_buffer_set_that_another_owner_uses() -> None:
    found = subject("dgl", "plain")
    assert found is not None
    ir = copied(found.program.ir)
    _assign(ir, "1", "model.0.1.running_mean", "1")
    texts = [f.text for f in static.check(ir)]
    assert texts == ["'1' assigns '0.1.running_mean', which '0' uses as well"]
    ir = copied(found.program.ir)
    _assign(ir, "0", "model.0.1.running_mean", "0")
    assert static.check(ir) == []


def test_reachability_sees_a_layer_that_is_labelled_as_the_batch() -> None:
    _, ir = _dgl()
    layer = ir.boundaries(consumer="1")[0].value
    layer.meta["owner"] = "data"
    texts = [f.text for f in static.check(ir)]
    assert "objective '0.loss' of '0' reaches parameter '0.0.weight', which 'data' owns" in texts


def test_a_copy_is_the_same_program_with_a_model_of_its_own() -> None:
    for method, shape in (("altmin", "convolutional"), ("dtp", "residual"), ("fa", "plain")):
        found = subject(method, shape)
        assert found is not None
        judge, ir = Judge(found), copied(found.program.ir)
        assert str(ir) == str(found.program.ir)
        theirs = {id(p) for p in found.program.root.parameters()}
        assert not theirs & {id(p) for p in ir.root.parameters()}
        assert judge._truth(ir, judge._learners(ir)) == (Truth.SAME, [])
        assert _holdings(judge._learners(ir)).keys() == found.program.optimizers.keys()
