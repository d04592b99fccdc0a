"""What a phase trains, what rests meanwhile, and what `fit` makes of phases under each schedule."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from locc import MethodError, RunError
from locc.callbacks import Callback, Fit
from locc.ir.view import Phase
from locc.testing import assert_lowered
from runtime.turns import InPhases, Probing, norms
from support import batch, compiled, mlp, same, sgd, snapshot

F64 = torch.float64
BOTTOM, TOP = Phase("bottom", ("a",)), ("b", "c")


def in_phase(frozen: tuple[str, ...] | None, model: nn.Module) -> Any:
    method = InPhases((BOTTOM, Phase("top", TOP, frozen=frozen)))
    program = compiled(model, method, ["a", "b"], optimizer=sgd(0.1))
    program.phase = "top"
    return program


def state(part: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in part.state_dict().items()}


# ---- what rests --------------------------------------------------------------------------------


def test_the_statistics_and_dropout_of_an_idle_module_rest():
    """The module above trains as on fixed features, which is what it says in the papers."""
    model = norms().double()
    model.b[3].p = 0.0  # its own dropout would need the program's random streams
    model.a[1].running_mean.uniform_(-1, 1)
    program, eager = in_phase(None, model), copy.deepcopy(model)
    x, y = batch(6, F64)
    below = snapshot(model.a)
    program.step(x, y)
    with torch.no_grad():
        h = eager.a.eval()(x)
    functional.cross_entropy(eager.c(eager.b(h).detach()), y).backward()
    sgd(0.1)(eager.c.parameters()).step()
    assert same(below, snapshot(model.a))
    assert torch.allclose(model.c.weight, eager.c.weight, rtol=0, atol=1e-12)
    for name, value in eager.b[1].named_buffers():
        assert torch.allclose(value, model.b[1].get_buffer(name), rtol=0, atol=1e-12)
    assert all(m.training for m in model.modules())


def test_what_a_phase_does_not_freeze_stays_live():
    model = norms().double()
    program = in_phase((), model)
    masks: list[Tensor] = []
    model.a[3].register_forward_hook(lambda m, a, out: masks.append(out == 0))
    x, y = batch(6, F64)
    mean, weight = model.a[1].running_mean.clone(), model.a[0].weight.clone()
    features = model.a[0](x).mean(0).detach()
    for _ in range(2):
        program.step(x, y)
        mean = 0.9 * mean + 0.1 * features
    assert torch.allclose(model.a[1].running_mean, mean, rtol=0, atol=1e-12)
    assert not torch.equal(*masks)
    assert torch.equal(model.a[0].weight, weight)


def test_a_phase_may_freeze_some_of_what_does_not_train():
    phases = (Phase("last", ("c",), frozen=("a",)), Phase("all", ("a", "b", "c")))
    model = norms()
    program = compiled(model, InPhases(phases), ["a", "b"])
    program.phase = "last"
    below, above = state(model.a), state(model.b)
    program.step(*batch(6))
    assert same(below, state(model.a))
    assert {n for n, v in state(model.b).items() if not torch.equal(v, above[n])} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def test_modes_come_back_also_where_a_step_fails_and_the_users_own_eval_stays():
    model = norms()
    program = in_phase(None, model)
    model.a[1].eval()
    model.b[1].eval()
    modes = [m.training for m in model.modules()]

    def fail(*_: Any) -> None:
        raise ValueError("mine")

    handle = model.c.register_forward_pre_hook(fail)
    with pytest.raises(RunError, match="ValueError: mine"):
        program.step(*batch(6))
    handle.remove()
    program.step(*batch(6))
    assert [m.training for m in model.modules()] == modes


def test_every_phase_computes_what_the_graph_means():
    for schedule in ("lockstep", "sequential"):
        program = compiled(norms().double(), Probing(), ["a", "b"], schedule=schedule)
        for phase in program.phases:
            program.phase = phase.name
            assert_lowered(program, *batch(6, F64), steps=3)
            program.step(*batch(6, F64))


# ---- what fit makes of them --------------------------------------------------------------------


def test_the_sequential_schedule_keeps_a_methods_own_phases():
    program = compiled(norms(), Probing(), ["a", "b"], schedule="sequential")
    found = {p.name: (p.trains, program.plan(p.name).trains) for p in program.phases}
    assert found == {
        "a/warm": (("a.probe",),) * 2,
        "a/probes": (("a.probe",),) * 2,
        "a/modules": (("a",),) * 2,
        "b/warm": (("b.probe",),) * 2,
        "b/probes": (("b.probe",),) * 2,
        "b/modules": (("b",),) * 2,
        "c/modules": (("c",),) * 2,
    }
    history = program.fit([batch(6)], epochs=2, progress=False)
    turns = [(1, "probes"), (1, "modules"), (2, "probes"), (2, "modules")]
    stage = [(0, "warm"), (0, "warm"), *turns]
    assert [(e.number, e.phase) for e in history.epochs] == [
        *[(number, f"a/{name}") for number, name in stage],
        *[(number, f"b/{name}") for number, name in stage],
        (1, "c/modules"),
        (2, "c/modules"),
    ]
    again = program.fit([batch(6)], progress=False)  # what has warmed up stays warm
    assert [e.phase for e in again.epochs] == [
        "a/probes",
        "a/modules",
        "b/probes",
        "b/modules",
        "c/modules",
    ]


def test_in_a_stage_the_earlier_modules_rest_whatever_the_method_freezes():
    """And a method that only warms up has its modules trained after that."""
    program = compiled(
        norms(), InPhases((Phase("first", TOP, warmup=True, frozen=()),)), ["a", "b"], schedule="sequential"
    )
    assert [(p.name, p.trains, p.frozen) for p in program.phases] == [
        ("a", ("a",), None),
        ("b/first", ("b",), ("a",)),
        ("b", ("b",), None),
        ("c/first", ("c",), ("a", "b")),
        ("c", ("c",), None),
    ]


def test_dtp_takes_turns_in_lockstep_and_cannot_train_one_module_after_the_other():
    program = compiled(mlp(), "dtp", ["relu1", "relu2"])
    history = program.fit([batch()], epochs=2, progress=False)
    assert [(e.number, e.phase) for e in history.epochs] == [
        (1, "inverses"),
        (1, "forward"),
        (2, "inverses"),
        (2, "forward"),
    ]
    message = r"one module after the other, but method 'dtp' needs '\S+' to train 'relu1'; use schedule='lock"
    with pytest.raises(MethodError, match=message):
        compiled(mlp(), "dtp", ["relu1", "relu2"], schedule="sequential")


# ---- steps without data ------------------------------------------------------------------------


def test_a_phase_without_data_makes_its_steps_at_its_own_rate_before_the_loader_is_read():
    asked, rates = [], []

    def loader() -> Iterator[Any]:
        asked.append(program.steps)
        yield batch()

    class Watch(Callback):
        def on_step_end(self, fit: Fit, report: Any) -> None:
            rates.append([o.param_groups[0]["lr"] for o in program.optimizers.values()])

    model = mlp()
    program = compiled(
        model,
        "al",
        ["relu1"],
        warmup=5,
        optimizer=sgd(0.1),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    )
    assert "# phase 'labels', 5 step(s) without data before the first epoch, trains: output" in str(
        program.ir
    )
    assert program.certificate.phases == tuple(map(str, program.phases))
    assert "phases          'labels', 5 step(s) without data before" in str(program.certificate)
    seen: list[Any] = []
    program.optimizers["output"].register_step_pre_hook(
        lambda o, *_: seen.append((o.param_groups[0]["lr"], snapshot(model)))
    )
    start = snapshot(model.first)
    history = program.fit(loader(), progress=False, scheduler_interval="step", callbacks=[Watch()])
    assert [(e.number, e.phase) for e in history.epochs] == [(0, "labels"), (1, "train")]
    assert asked == [5]
    assert program.steps == 6
    rate, (_, first), (_, last) = program.phases[0].lr, seen[0], seen[4]
    assert [lr for lr, _ in seen] == [rate] * 5 + [0.2]
    assert rates == [[0.1, 0.2]] * 5 + [[0.05, 0.1]]
    assert same(start, {n.removeprefix("first."): v for n, v in last.items() if "first." in n})
    assert not torch.equal(first["third.weight"], last["third.weight"])


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase("one", ("a", "d"))], "phase 'one' of method 'InPhases' names 'd', which does not exist"),
        ([Phase("one", ("a",), frozen=("x",))], "phase 'one' of method 'InPhases' names 'x', which does"),
        (
            [Phase("one", ("a", *TOP), steps=3)],
            "phase '(a/)?one' of method 'InPhases' would make its steps without data",
        ),
        ([BOTTOM, Phase("bottom", TOP)], "two phases of method 'InPhases' are called 'bottom'; give each"),
    ],
)
def test_phases_that_cannot_be(phases, message):
    for schedule in ("lockstep", "sequential"):
        with pytest.raises(MethodError, match=message):
            compiled(norms(), InPhases(tuple(phases)), ["a", "b"], schedule=schedule)


class Functional(nn.Module):
    """What eval mode does not silence, in the module `a`."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "draws":
            x = functional.dropout(x, 0.3)
        if self.what == "follows":
            x = functional.dropout(x, 0.3, training=self.training)
        if self.what == "writes":
            self.seen.add_(1.0)
            x = x / self.seen
        if self.what == "shares":
            x = self.drop(x)
        h = self.b(self.a(x))
        return self.c(self.drop(h) if self.what == "shares" else h)


REFUSALS = {
    "draws": r"freezes module 'a' in eval mode, but its forward draws random numbers in 'dropout' \(.*py:\d+"
    r"\) whatever the mode; use nn.Dropout or F.dropout\(x, p, self.training\), or keep that line inside a "
    "submodule that no split opens",
    "writes": r"freezes module 'a' in eval mode, but its forward changes 'seen' in 'add_' \(.*py:\d+\) "
    "whatever the mode; keep that line inside a submodule that no split opens",
    "shares": r"freezes module 'a' in eval mode, but 'c', which trains, calls the same submodule in "
    r"'drop' \(.*py:\d+\); give each of them a Dropout of its own",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_eval_mode_does_not_silence_cannot_be_frozen(what):
    turns = InPhases((BOTTOM, Phase("top", TOP)))
    asked = "method 'InPhases' is undefined on this model: its phase 'top' "
    with pytest.raises(MethodError, match=asked + REFUSALS[what]):
        compiled(Functional(what), turns, ["a", "b"])
    with pytest.raises(MethodError, match="schedule='sequential' " + REFUSALS[what]):
        compiled(Functional(what), "dgl", ["a", "b"], schedule="sequential")
    live = InPhases((BOTTOM, Phase("top", TOP, frozen=())))
    program = compiled(Functional(what), live, ["a", "b"])
    program.phase = "top"
    program.step(*batch())


def test_a_dropout_function_that_follows_the_mode_rests_with_its_module():
    program = in_phase(None, Functional("follows").double())
    for group in (g for optimizer in program.optimizers.values() for g in optimizer.param_groups):
        group["lr"] = 0.0
    x, y = batch(6, F64)
    undropped = functional.cross_entropy(copy.deepcopy(program.model).eval()(x), y)
    torch.testing.assert_close(program.step(x, y).loss, undropped, atol=1e-12, rtol=0)
    program.phase = "bottom"
    one, other = (program.step(x, y).objectives["a.ce"] for _ in range(2))
    assert one != other


def test_a_module_that_no_phase_trains_has_no_stage():
    with pytest.raises(MethodError, match="'sequential': no phase of method 'InPhases' trains module 'a'"):
        compiled(norms(), InPhases((Phase("top", TOP),)), ["a", "b"], schedule="sequential")


def test_a_phase_with_nothing_to_report_says_so():
    program = compiled(norms(), InPhases((BOTTOM, Phase("none", ()))), ["a", "b"])
    program.phase = "none"
    report = program.step(*batch(6))
    message = r"report.loss: this step computed neither the loss nor an objective, .*program\.evaluate"
    with pytest.raises(RunError, match=message):
        report.loss  # noqa: B018
    assert report.objectives == {}
    program.phase = None
    history = program.fit([batch(6)], progress=False)
    assert [(e.phase, e.loss, list(e.objectives)) for e in history.epochs] == [
        ("bottom", None, ["a.ce"]),
        ("none", None, []),
    ]
