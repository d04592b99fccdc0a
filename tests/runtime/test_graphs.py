"""backend="cudagraphs": the same training, recorded; what cannot be recorded is named.

On the CPU a `TapeRecorder` records. It runs the same operators on the same tensors again, as a CUDA graph
does, so that whatever else a step depends on (numbers of Python's, new tensors, seeds) shows as a difference.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc import LoccError, Program, RunError
from locc.runtime import graphs
from locc.testing import Case, ModelSpec
from runtime.tape import TapeRecorder
from runtime.turns import norms
from support import batch, compiled, everything, same, sgd, snapshot, usual_case

X, Y = batch(6)


class Counted:
    """A recorder, and what it has recorded."""

    def __init__(self, recorder: Any) -> None:
        self.recorder, self.tapes = recorder, list[Any]()

    def record(self, run: Any, streams: int) -> Any:
        made = self.recorder.record(run, streams)
        tape = SimpleNamespace(replays=0)

        def replay(seeds: Any) -> None:
            tape.replays += 1
            made.replay(seeds)

        tape.replay = replay
        self.tapes.append(tape)
        return tape


DEVICE = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What records on the device on which the test trains."""
    device = torch.device(request.param, 0)
    found = Counted(TapeRecorder() if device.type == "cpu" else graphs.CudaGraphs(device))
    monkeypatch.setattr("locc.compiler.recorder_for", lambda _: found)
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", device)
    return found


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


def trained(backend: str, steps: Any, make: Any = norms, **given: Any) -> Program:
    torch.manual_seed(0)
    options: dict[str, Any] = {"method": "dgl", "splits": ["a", "b"], "optimizer": adam, **given}
    program = compiled(make().to(DEVICE), seed=1, verify=False, backend=backend, **options)
    steps(program)
    return program


def plain(program: Program, sizes: tuple[int, ...] = (5,) * 5) -> None:
    for i, size in enumerate(sizes):
        program.step(X[:size] * (1 + i), Y[:size])


def twins(steps: Any = plain, **given: Any) -> Program:
    """The recorded program after some steps, after which the eager one is equal in every bit."""
    eager, other = (trained(backend, steps, **given) for backend in ("eager", "cudagraphs"))
    assert same(everything(eager), everything(other))
    return other


def replays(recorder: Counted) -> list[int]:
    return [tape.replays for tape in recorder.tapes]


def turns(program: Program) -> list[graphs.Turn]:
    found = program.built.executor.graphs
    assert found is not None
    return [t for _, made in found.plans.values() for t in made if isinstance(t, graphs.Turn)]


def of(case: Case, backend: str) -> Program:
    splits = case.splits if isinstance(case.splits, int) else list(case.splits)
    return locc.compile(
        case.model.build().to(DEVICE), case.method, splits, loss=case.model.criterion,
        example_inputs=case.batch()[0], optimizer=adam, schedule="lockstep", seed=case.seed,
        tied=case.tied, backend=backend, verify=False,
    )  # fmt: skip


# ---- the same training -------------------------------------------------------------------------

FAST = ("bp", "dgl", "dtp", "infopro", "bcd2")


@pytest.mark.parametrize(
    "method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in sorted(locc.methods())]
)
def test_recorded_steps_train_the_same_bits(method: str, recorder: Counted) -> None:
    case = usual_case(method)
    found = []
    for backend in ("eager", "cudagraphs"):
        program = of(case, backend)
        losses = [program.step(*case.batch(i)).loss for i in range(5)]
        found.append((everything(program), [float(loss) for loss in losses if loss is not None]))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert len(program.backend_report.modules) >= len(program.ir.modules)
    if method in ("dgl", "infopro", "bcd2"):
        assert not program.backend_report.eager
        assert min(replays(recorder)) >= 3


def test_a_recording_leaves_gradients_that_wait_for_their_update(recorder: Counted) -> None:
    case = Case(ModelSpec("auxiliary", ("tanh",)), "ddtp-rhl", splits=2, batch_size=2)  # targets in between
    found = []
    for backend in ("eager", "cudagraphs"):
        program = of(case, backend)
        for i in range(5):
            program.step(*case.batch(i))
        found.append(everything(program))
    assert same(*found)
    assert sum(replays(recorder)) > 0


def wave(program: Program) -> None:
    for _ in range(3):
        program.wave([(X[:5] * (1 + i), Y[:5]) for i in range(3)])


def fit(program: Program) -> None:
    program.fit([(X[:5] * (1 + i), Y[:5]) for i in range(4)], epochs=2, progress=False)


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (wave, {"schedule": "wave"}),
        (fit, {"schedule": "sequential"}),
        (plain, {"update": "in_backward"}),
        (plain, {"clip": 0.1}),
        (plain, {"autocast": "bfloat16"}),
        (plain, {"splits": [], "method": "bp"}),
        (plain, {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)}),
    ],
    ids=["wave", "sequential", "in_backward", "clip", "autocast", "end to end", "sgd"],
)
def test_settings_train_the_same_bits(steps: Any, options: Any, recorder: Counted) -> None:
    other = twins(steps, **options)
    assert not other.backend_report.eager
    assert min(replays(recorder)) > 1


def test_each_shape_of_batch_has_a_recording(recorder: Counted) -> None:
    twins(partial(plain, sizes=(5, 5, 3, 5, 5, 3, 3, 5)))
    assert sorted(replays(recorder)) == [2, 2, 2, 3, 3, 3]


def test_the_oldest_recordings_go(recorder: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    other = twins(partial(plain, sizes=(5, 5, 5, 3, 3, 3, 5)))
    assert sorted(replays(recorder)) == [1, 1, 1, 2, 2, 2]
    assert {len(turn.kept) for turn in turns(other)} == {1}


def test_a_hook_that_comes_later_is_called(recorder: Counted) -> None:
    program = trained("cudagraphs", plain)
    called: list[Any] = []
    program.model.get_submodule("b").register_forward_hook(lambda *_: called.append(_))
    plain(program, (5, 5))
    assert len(called) == 2
    assert [piece.module for piece in program.backend_report.eager] == ["b"]


def test_a_rate_or_a_mode_that_changes_is_recorded_anew(recorder: Counted) -> None:
    def steps(program: Program) -> None:
        plain(program)
        for scheduler in program.schedulers.values():
            scheduler.step()
        plain(program)
        program.model.get_submodule("a.3").p = 0.4
        program.model.get_submodule("a.3").eval()
        plain(program)

    twins(steps, scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    assert len(recorder.tapes) == 7


def test_a_rate_on_the_device_is_read_there(recorder: Counted) -> None:
    def steps(program: Program) -> None:
        for i in range(5):
            plain(program, (5,))
            for optimizer in program.optimizers.values():
                optimizer.param_groups[0]["lr"].fill_(0.01 / (2 + i))

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=torch.tensor(0.01, device=DEVICE), fused=True)

    eager, other = (trained(backend, steps, optimizer=make) for backend in ("eager", "cudagraphs"))
    assert same(snapshot(eager), snapshot(other))
    assert replays(recorder) == [3, 3, 3]


def test_a_loaded_state_is_the_one_that_trains(recorder: Counted, tmp_path: Path) -> None:
    def steps(program: Program) -> None:
        plain(program)
        program.save(tmp_path / "state")
        plain(program)
        program.load(tmp_path / "state")
        plain(program)

    twins(steps)
    assert len(recorder.tapes) == 6


def test_a_report_keeps_its_numbers(recorder: Counted) -> None:
    def losses(program: Program) -> None:
        reports = [program.step(X[:5] * (1 + i), Y[:5]) for i in range(5)]
        found.append([(float(r.loss), {k: float(v) for k, v in r.objectives.items()}) for r in reports])

    found: list[Any] = []
    twins(losses)
    assert found[0] == found[1]
    assert len({loss for loss, _ in found[1]}) == 5


def test_what_is_not_finite_is_skipped_and_told_later(recorder: Counted) -> None:
    program = trained("cudagraphs", plain)
    before = snapshot(program.model.get_submodule("c"))
    program.step(X[:5], Y[:5])
    assert not same(before, snapshot(program.model.get_submodule("c")))
    before = {n: p.detach().clone() for n, p in program.model.named_parameters()}
    program.step(X[:5] * float("nan"), Y[:5])
    assert same(before, {n: p.detach() for n, p in program.model.named_parameters()})
    with pytest.raises(RunError, match=r"objective .* of module 'a' is nan"):
        program.built.executor.raise_deferred()


def test_an_error_says_which_recorded_modules_were_updated(recorder: Counted) -> None:
    fails: list[bool] = []
    model = norms()

    def hook(*_: Any) -> None:
        if fails:
            raise KeyError

    model.c.register_forward_hook(hook)
    program = trained("cudagraphs", plain, make=lambda: model)
    fails.append(True)
    with pytest.raises(KeyError) as caught:
        plain(program)
    assert "Updated before that: 'a', 'b';" in caught.value.__notes__[0]


# ---- what is not recorded ----------------------------------------------------------------------


class Waiting(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


class LookingBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (2.0 if float(gradients[0].sum()) > 1e9 else 1.0)


class WaitingLate(nn.Tanh):
    """Waits when the gradients of later layers are there."""

    def forward(self, x: Tensor) -> Tensor:
        return LookingBack.apply(super().forward(x))


class Drawing(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


def odd(layer: Any) -> nn.Sequential:
    model = norms()
    model.b[2] = layer()
    return model


def hooked() -> nn.Sequential:
    model = norms()
    model.b.register_forward_hook(lambda *_: None)
    return model


OBSTACLES: dict[str, tuple[Any, Any, str]] = {
    "waits": (partial(odd, Waiting), adam, "operation not permitted when stream is capturing"),
    "waits late": (partial(odd, WaitingLate), adam, "operation not permitted when stream is capturing"),
    "draws": (partial(odd, Drawing), adam, "it draws random numbers on the CPU"),
    "hooks": (hooked, adam, "it has hooks, which would not be called"),
    "optimizer": (norms, sgd(), "its optimizer, SGD, waits for the device"),
}


def plain_noting(program: Program, before: list[dict[str, Tensor]]) -> None:
    for _ in range(3):
        before.append(snapshot(program))
        plain(program, (5,))


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_cannot_be_recorded_runs_eagerly(
    case: str, recorder: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    make, optimizer, reason = OBSTACLES[case]

    def steps(program: Program) -> None:
        random.seed(0)
        plain(program)

    found = [trained(backend, steps, make=make, optimizer=optimizer) for backend in ("eager", "cudagraphs")]
    assert same(snapshot(found[0]), snapshot(found[1]))
    eager = {piece.module: piece.reason for piece in found[1].backend_report.eager}
    assert reason in eager["b"]
    assert set(eager) == ({"a", "b", "c"} if case == "optimizer" else {"b"})
    assert f"b: runs eagerly, for {reason}" in str(found[1].backend_report)
    assert sum("module 'b' runs eagerly" in text for text in caplog.messages) == 1

    program = trained("cudagraphs", lambda _: None, make=make, optimizer=optimizer, strict=True)
    before = [snapshot(program)]
    with pytest.raises(RunError, match=rf"module '[ab]' cannot be recorded: .*{reason}"):
        plain_noting(program, before)
    assert same(before[-1], snapshot(program))


def test_what_others_interrupt_runs_eagerly(recorder: Counted) -> None:
    other = twins(method="bp")
    reasons = {piece.module: piece.reason for piece in other.backend_report.pieces}
    assert reasons == {
        "a": "other modules run between its forward and its backward pass",
        "b": "other modules run between its forward and its backward pass",
        "c": None,
    }


def test_a_rate_that_always_changes_is_told(recorder: Counted) -> None:
    def steps(program: Program) -> None:
        for _ in range(4):
            plain(program, (5,))
            for scheduler in program.schedulers.values():
                scheduler.step()

    other = twins(steps, scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9))
    assert not recorder.tapes
    assert {piece.reason for piece in other.backend_report.eager} == {graphs.NEVER_ALIKE}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "the model is on cpu; move it to a GPU"),
        ({"schedule": "replay"}, "schedule='replay' hands on values"),
        ({"offload": "cpu"}, "backend='cudagraphs' does not work with offload="),
        ({"accumulate": 2}, "backend='cudagraphs' does not work with accumulate="),
        ({"atomic": True}, "backend='cudagraphs' does not work with atomic="),
        ({"recompute": True}, "recompute=True is of backend='eager'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value), "cpu"),
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LoccError, match=says):
        trained("cudagraphs", plain, **options)
