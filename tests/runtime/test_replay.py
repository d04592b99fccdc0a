"""Modules that replay what they have kept: what they read, in whose turn, and how that is saved.

The authors' formulation of `dgl-async` (eugenium/DGL, a9c8786, buffer_experiments/cifar_buffer.py): `Buffer`,
lines 134 to 194. Ours departs in two places: the newest of the least used is read, where theirs, if the
oldest of a full buffer is one of these, takes that for the newest (line 191 has > for >=); and a batch is
read `reuse` times, there once less, since it counts as used when it is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc import CheckpointError, LoccError, MethodError
from locc.lower import Receive
from locc.runtime.replay import FIFO, Batch, Replay, Workers
from runtime.turns import batches, every_other, network
from support import batch, compiled, everything, mlp, same, sgd

LR = torch.optim.lr_scheduler


SIX = batches(*[4] * 6)


def program_of(**options: Any) -> locc.Program:
    return every_other(network(), "dgl", seed=1, **options)


def trained(program: locc.Program) -> dict[str, Tensor]:
    """Return what training has made: the model, the heads and the optimizers."""
    return {n: t for n, t in everything(program).items() if n.startswith(("state/", "optimizer/", "grad/"))}


def test_without_a_buffer_it_is_lockstep() -> None:
    states = []
    for options in ({"schedule": "lockstep"}, {"schedule": "replay", "buffer": 0}):
        program = program_of(**options)
        program.fit(SIX, 2, progress=False, scheduler_interval="step")
        states.append(trained(program))
    assert same(*states)


def test_a_fit_that_was_cut_goes_on_with_what_was_kept(tmp_path: Path) -> None:
    whole, first, second = (program_of(schedule="replay", buffer=3, slow={"1": 0.5}) for _ in range(3))
    whole.fit(SIX, 4, progress=False)
    first.fit(SIX, 2, progress=False)
    assert any(first.workers(None).buffers)
    first.save(tmp_path / "file")
    second.load(tmp_path / "file")
    second.fit(SIX, 2, progress=False)
    assert same(trained(whole), trained(second))


def test_labels_travel_with_what_was_made_of_their_samples() -> None:
    """Every module passes on its input, which says the label."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(len(layer.weight), 4))
            layer.bias.zero_()
    program = compiled(model, "dgl", ["0", "1"], schedule="replay", buffer=4, optimizer=sgd(0.0))
    met: dict[str, list[bool]] = {"1": [], "2": []}

    def look(instruction: Any, values: dict[str, Any]) -> None:
        if isinstance(instruction, Receive):
            label = values[instruction.value][:, 0].detach()
            met[instruction.owner].append(torch.equal(label, values["target"].float()))

    program.built.executor.observe = look
    for label in range(30):
        x = torch.full((5, 4), float(label % 3))
        program.step(x, torch.full((5,), label % 3))
    assert all(len(held) > 15 and all(held) for held in met.values())


def test_the_newest_of_the_least_used_is_read_and_the_oldest_goes() -> None:
    program = compiled(mlp(), "dgl", ["first"], schedule="replay", buffer=3, reuse=2)
    workers = program.workers(None)
    for number in range(4):
        workers.write(1, Batch([number], {}))
    read = [workers._read(1) for _ in range(4)]
    assert [one and one.inputs[0] for one in read] == [3, 2, 1, 3]
    workers.write(1, Batch([4], {}))  # the oldest goes: 1
    read = [workers._read(1) for _ in range(4)]
    assert [one and one.inputs[0] for one in read] == [4, 4, 2, None]


def test_first_in_first_out_reads_each_once() -> None:
    workers = Workers.of(Replay(3, FIFO), [None, None], 0)  # type: ignore[list-item]
    for number in range(4):
        workers.write(1, Batch([number], {}))
    read = [workers._read(1) for _ in range(4)]
    assert [one and one.inputs[0] for one in read] == [1, 2, 3, None]


def test_turns_are_as_many_as_the_slow_down_leaves() -> None:
    program = compiled(
        mlp(), "dgl", ["first", "second"], schedule="replay", buffer=50, slow={"second": 0.75}, seed=0
    )
    took = {"first": 0, "second": 0, "third": 0}

    def updated(_: int, owners: tuple[str, ...], objectives: Any) -> None:
        assert set(objectives) == {f"{owners[0]}.loss"}
        took[owners[0]] += 1

    for _ in range(400):
        report = program.replay(*batch(5), updated)
    assert took["first"] == 400 == program.steps
    assert took["second"] == pytest.approx(100, abs=30)  # three deviations
    assert took["third"] == pytest.approx(400, abs=85)
    assert set(report.objectives) == {"first.loss", "second.loss", "third.loss"}
    assert report.network_loss is not None


def test_a_worker_hands_on_what_is_read_elsewhere_and_loses_turns_when_slowed_down() -> None:
    program = compiled(mlp(), "dgl", ["first", "second"], schedule="replay", slow={"second": 0.75}, seed=0)
    workers, sent = program.workers(None), list[Batch]()
    workers.own, workers.hand = range(1, 2), sent.append
    assert not workers.ready()
    x, y = batch(5)
    workers.write(1, Batch([x, y], {"first": torch.rand(5, 8)}))
    assert workers.ready()
    workers.turn(program.built.executor, lambda *_: None)
    assert workers.steps == [0, 1, 0]
    (handed,) = sent
    assert handed.values.keys() == {"second"}
    assert handed.inputs[0] is None  # of the data the last module reads the labels alone
    assert handed.inputs[1] is y
    workers.seconds = 0.0
    assert [workers._drawn(0) for _ in range(400)].count(1) == pytest.approx(100, abs=30)  # three deviations


def test_a_method_may_be_published_with_it() -> None:
    program = compiled(mlp(), "dgl-async", ["first"])
    assert program.settings.schedule == "replay"
    assert "in replay: each module from buffers of 50 batches, priority-lifo" in program.certificate.training
    assert compiled(mlp(), "dgl-async", ["first"], schedule="lockstep").settings.schedule == "lockstep"
    assert compiled(mlp(), "al-pipe", ["first", "second"]).settings.schedule == "pipelined"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"buffer": 3}, "are of schedule='replay', and schedule='lockstep' was asked for"),
        ({"schedule": "replay", "buffer": -1}, "buffer=-1: give the number of batches"),
        ({"schedule": "replay", "policy": "lifo"}, "policy='lifo' is unknown; nearest: 'fifo'"),
        ({"schedule": "replay", "reuse": 0}, "reuse=0: give how often"),
        ({"schedule": "replay", "slow": {"first": 1.0}}, "slow={'first': 1.0}: give a share"),
        (
            {"schedule": "replay", "slow": {"firts": 0.5}},
            "slow= names 'firts', which is no module; .*'first'",
        ),
        ({"schedule": "replay", "atomic": True}, "atomic=True undoes a step that fails"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoccError, match=said):
        compiled(mlp(), "dgl", ["first"], **options)


def test_a_program_that_needs_the_modules_above_is_refused() -> None:
    with pytest.raises(MethodError, match=r"schedule='replay' .* method 'bp' is not pipeline-exact"):
        compiled(mlp(), "bp", ["first"], schedule="replay")


def test_a_file_keeps_targets_of_any_plain_structure(tmp_path: Path) -> None:
    class Box:
        pass

    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))

    def loss(output: Tensor, target: Any) -> Tensor:
        return nn.functional.cross_entropy(output, target["of"][0])

    x, y = batch(4)
    for extra in (("a", 1.5, None), Box()):
        program = compiled(model, "dgl", ["0"], loss=loss, schedule="replay", buffer=2, optimizer=sgd())
        for _ in range(3):
            program.step(x, {"of": [y], "more": extra})
        if isinstance(extra, Box):
            with pytest.raises(CheckpointError, match="kept for replay holds a Box"):
                program.save(tmp_path / "file")
            continue
        program.save(tmp_path / "file")
        kept = program.workers(None).buffers[1][0].inputs
        program.load(tmp_path / "file")
        found = program.workers(None).buffers[1][0].inputs
        assert found[-1]["more"] == extra
        assert all(torch.equal(a, b) for a, b in zip(kept[:1], found[:1], strict=True))
