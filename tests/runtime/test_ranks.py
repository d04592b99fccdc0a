"""One program in several processes: the bits of lock-step training, whoever holds what."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import locc
from locc import LoccError, MethodError, RunError, files
from locc.callbacks import BestCheckpoint
from locc.runtime import folder
from locc.runtime.backends import Eager
from locc.runtime.ranks import Away, lent
from locc.runtime.ranks.forecast import forecast
from locc.runtime.ranks.links import Links
from locc.runtime.ranks.placement import Cost, shared_out
from rules import written
from runtime.processes import Died, together
from runtime.several import SPLITS, After, cut, loader, program_of, stored
from runtime.turns import network
from support import Centred, batch, compiled, everything, mlp, same, sgd

LR = torch.optim.lr_scheduler


def fitted(
    rank: int, method: str, schedule: str, file: str, epochs: int = 2, start: str = "", **options: Any
) -> Any:
    """Train, and save the whole program to `file`; from `start` on, where there is one."""
    torch.manual_seed(rank)
    program = program_of(method, schedule, rank, **options)
    if start:
        program.load(start)
    best = BestCheckpoint(f"{file.rstrip('/')}-best/")
    history = program.fit(
        loader(), epochs, progress=False, validation=[batch(5)], scheduler_interval="step", callbacks=[best]
    )
    program.save(file)
    metrics = [epoch.metrics for epoch in history.epochs]
    return program.steps, metrics, {n: t.cpu().clone() for n, t in program.state_dict().items()}


USUAL = ("al",)


@pytest.mark.parametrize(
    ("method", "device"),
    [
        *(
            pytest.param(m, "cpu", marks=() if m in USUAL else pytest.mark.slow)
            for m in sorted(locc.methods())
            if m not in ("admm", "bcd2", "bcd3", "dladmm", "gim", "np-sg")  # undefined on this network
        ),
        pytest.param("dgl", "cuda", marks=pytest.mark.gpu),  # one device, and gloo through the CPU's memory
    ],
)
def test_ranks_end_with_the_bits_of_lockstep(method: str, device: str, tmp_path: Path) -> None:
    if not compiled(network(3), method, SPLITS).certificate.pipeline_exact:
        with pytest.raises(MethodError, match=f"schedule='pipelined' .* method '{method}' is not pipeline-"):
            program_of(method, "pipelined")
        return
    one, three = str(tmp_path / "one"), str(tmp_path / "three")
    steps, metrics, state = fitted(0, method, "lockstep", one, device=device)
    for found in together(3, partial(fitted, device=device), method, "pipelined", three):
        assert (found[0], found[1]) == (steps, metrics)
        assert same(found[2], state)
    for name in ("", "-best/"):
        assert same(stored(Path(one + name)), stored(Path(three + name)))


@pytest.mark.slow
def test_ranks_compile_what_they_train(tmp_path: Path) -> None:
    steps, metrics, state = fitted(0, "dgl", "lockstep", str(tmp_path / "one"), 1)
    for found in together(
        2, partial(fitted, backend="aot_eager"), "dgl", "pipelined", str(tmp_path / "two"), 1
    ):
        assert (found[0], found[1]) == (steps, metrics)
        assert same(found[2], state)


def test_a_checkpoint_of_some_ranks_goes_on_with_any_number_of_them(tmp_path: Path) -> None:
    files = [f"{tmp_path}/{name}" for name in ("whole", "first/", "second", "third/")]
    fitted(0, "dgl", "lockstep", files[0], 4)
    together(3, cut, files[1], 8)  # in the midst of a pass
    parts = [set(load_file(part)) for part in folder.parts(Path(files[1]))]
    assert len(parts) == 3
    assert sum(map(len, parts)) == len(set.union(*parts))  # none writes what another one holds
    together(2, cut, files[2], 14, files[1])
    fitted(0, "dgl", "lockstep", files[3], 4, files[2])
    assert same(stored(Path(files[0])), stored(Path(files[3])))


class Measured:
    """Yields batches, and notes after each how many bytes of parameters a program holds."""

    def __init__(self, program: locc.Program, batches: Any) -> None:
        self.program, self.batches = program, batches
        self.bytes: set[int] = set()

    def __iter__(self) -> Iterator[Any]:
        for one in self.batches:
            yield one
            self.bytes.add(held(self.program))


def held(program: locc.Program) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in program.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def apart(rank: int, file: str, offload: str | None) -> Any:
    """As `fitted`, where each rank keeps to its modules until the end; return what it held."""
    torch.manual_seed(rank)
    program = program_of("dgl", "pipelined", rank, stages=[["0"], ["1"], ["2", "3"]], offload=offload)
    every = held(program)
    training, validation = Measured(program, loader()), Measured(program, [batch(5)])
    history = program.fit(
        training, 2, progress=False, validation=validation, scheduler_interval="step", gather=False
    )
    program.save(file)
    found = training.bytes | validation.bytes | {held(program)}
    x = batch(5)[0]
    for ask in (
        lambda: program(x),
        lambda: program.model(x),
        program.model.state_dict,
        lambda: program.to("cpu"),
    ):
        with pytest.raises(RunError, match=r"call program.gather\(\) on every rank first"):
            ask()
    with pytest.raises(RuntimeError):
        program.model[(rank + 1) % 3][0].weight.data.add_(1.0)
    assert program.evaluate([batch(5)]) == history.epochs[-1].validation
    own = sum(p.nbytes for o in program.ranks.owners for p in program.ir.parameters(o).values())
    program.gather()
    assert held(program) == every
    assert program.evaluate([batch(5)]) == history.epochs[-1].validation
    state = {n: t.clone() for n, t in program.state_dict().items()}
    return found, own, [epoch.metrics for epoch in history.epochs], state


@pytest.mark.parametrize("offload", [None, pytest.param("disk", marks=pytest.mark.slow)])
def test_a_rank_holds_the_parameters_of_its_modules_alone(offload: str | None, tmp_path: Path) -> None:
    one, three = str(tmp_path / "one"), str(tmp_path / "three")
    _, metrics, state = fitted(0, "dgl", "lockstep", one)
    for bytes_held, own, found, left in together(3, apart, three, offload):
        assert bytes_held == {own + 4}  # one number stands for all the others
        assert found == metrics
        assert same(left, state)
    assert same(load_file(one), load_file(three))


def lean(rank: int, meta: bool, schedule: str = "pipelined") -> Any:
    """Train what is built in files or on the meta device; return what is in files when, and the weights."""
    torch.manual_seed(0)
    with torch.device("meta") if meta else locc.deferred():
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3))
    x, y = torch.randn(4, 40, generator=torch.Generator().manual_seed(1)), torch.arange(4) % 3
    stages = [["0"], ["1", "2"]] if schedule == "pipelined" else None
    options: dict[str, Any] = {"schedule": schedule, "stages": stages, "verify": False, "seed": 0}
    program = locc.compile(model, "dgl", ["0", "1"], example_inputs=x, **options)
    found = [in_files(model)]
    for _ in range(2):
        program.step(x, y)
    found.append(in_files(model))
    program.gather()
    return [*found, in_files(model)], {n: t.clone() for n, t in program.state_dict().items()}


def in_files(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters() if files.lies(tensor)}


@pytest.mark.parametrize("meta", [False, True], ids=["deferred", "meta"])
def test_ranks_compile_in_files_what_is_not_in_memory_and_hold_their_own_there(meta: bool) -> None:
    _, state = lean(0, meta, "lockstep")
    large = {"0.weight", "1.weight"}
    for (found, left), other in zip(together(2, lean, meta), ("1.weight", "0.weight"), strict=True):
        assert found == [large, set(), {other}]
        assert same(left, state)


@pytest.mark.parametrize("filed", [False, True])
def test_what_was_away_returns_to_where_it_was(filed: bool, tmp_path: Path) -> None:
    whole, kept = torch.rand(64, 64), torch.rand(4)
    part, alias, number = whole.t()[1:], kept[1:3], torch.rand(())
    before = (whole.shape, whole.stride()), (part.shape, part.stride(), part.storage_offset())
    if filed:
        files.move(tmp_path, [whole, part])
    away = Away(tmp_path)
    away.leave([whole, part, alias, number], [kept])
    assert whole in away
    assert part in away
    assert whole.untyped_storage().nbytes() == 4
    assert part.isnan().all()
    assert alias not in away  # in the memory of what is kept
    assert number not in away  # what stands for it would be as large
    away.back()
    assert before == ((whole.shape, whole.stride()), (part.shape, part.stride(), part.storage_offset()))
    assert files.in_file(whole.untyped_storage()) is filed
    whole.fill_(2.0)
    assert (part == 2.0).all()


def test_what_inference_reads_elsewhere_than_it_trains_is_lent() -> None:
    program = compiled(mlp(), "dgl", ["first"])
    homes = {owner: module.index for owner, module in program.ir.owners.items()}
    weight = program.model.first.weight
    path = SimpleNamespace(tensors={program.ir.last.name: [weight]})
    ranks: Any = SimpleNamespace(homes=homes, path=path, first=lambda owner: homes.get(owner, 0))
    ((tensor, rank),) = lent(ranks, program.ir)
    assert tensor is weight
    assert rank == 0


def paced(rank: int, file: str, dies: bool) -> Any:
    """Train three ranks at their own pace; the first one takes its time, or dies after three batches."""
    options = {"optimizer": lambda ps: torch.optim.Adam(ps, lr=0.01), "example_inputs": batch(4)[0]}
    program = locc.compile(
        network(3),
        "dgl",
        SPLITS,
        schedule="replay",
        stages=[["0"], ["1"], ["2", "3"]],
        timeout=20.0,
        **options,
    )

    def steps() -> list[int]:
        workers = program.workers(None)
        return [workers.steps[i] for i in workers.own]

    class Late:
        def __iter__(self) -> Iterator[Any]:
            for number, one in enumerate(loader()):
                if dies and number == 3:
                    time.sleep(1.0)
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.1)
                yield one

    if dies:
        with pytest.raises(RunError) as caught:
            program.fit(Late(), progress=False)
        return steps(), str(caught.value)
    with pytest.raises(LoccError, match="every=3: in schedule='replay' ranks meet at the end of a pass"):
        program.fit(Late(), checkpoint=file, every=3)
    history = program.fit(Late(), 2, progress=False, validation=[batch(5)], checkpoint=file, gather=False)
    one = locc.compile(network(3), "dgl", SPLITS, schedule="lockstep", **options)
    one.load(file)
    assert one.evaluate([batch(5)]) == history.epochs[-1].validation
    return steps(), program.steps, history.epochs[-1].metrics


@pytest.mark.slow
def test_at_their_own_pace_no_rank_waits_while_it_has_something_to_read(tmp_path: Path) -> None:
    (first, *_), (second, *_), (third, *_) = every = together(3, paced, f"{tmp_path}/parts/", False)
    assert first == [12]  # of batches of 4 in 22 samples, twice
    assert second[0] > 2 * 12  # from what it keeps
    assert min(third) > 2 * 12
    assert [found[1:] for found in every] == [every[0][1:]] * 3
    assert set(every[0][2]) >= {"loss", "0.loss", "1.loss", "2.loss", "3.loss", "validation_loss"}


def test_what_nobody_takes_in_time_is_dropped() -> None:
    group: Any = None
    links = Links(group, [], [], 0, torch.device("cpu"), most=2)
    links._out[1] = deque()
    for number in range(5):
        links.send(1, "batch", number)
    assert [value for _, _, value in links._out[1]] == [0, 3, 4]  # the first may be on its way
    links.errors[1] = RuntimeError("gone")
    links.send(1, "batch", 5)
    assert not links._out[1]


@pytest.mark.slow
def test_where_the_rank_below_is_dead_training_goes_on_with_what_is_kept(tmp_path: Path) -> None:
    died, (second, said), (third, also) = together(3, paced, str(tmp_path / "file"), True)
    assert isinstance(died, Died)
    assert second == [3 * 10]  # three batches, each read ten times
    assert third[0] == 30 * 10
    assert re.search(r"rank 0 \('0'\) is gone .*; rank 1 waited for a batch to train on", str(said)), said
    assert said == also


def by_hand(rank: int) -> Any:
    program = program_of("dgl", "pipelined", rank, stages=[["0", "1"], ["2", "3"]])
    x, y = batch(4)
    report = program.step(x, y)
    said = []
    asked = [lambda: program(x), lambda: program.export_onnx("none.onnx"), lambda: report.loss]
    for ask in asked[: 3 - rank]:  # rank 1 computes the loss
        with pytest.raises(RunError) as caught:
            ask()
        said.append(str(caught.value))
    program.gather()
    return sorted(report.objectives), said, program(x).detach()


def test_steps_by_hand() -> None:
    (first, said, left), (last, _, right) = together(2, by_hand)
    assert (first, last) == (["0.loss", "1.loss"], ["2.loss", "3.loss"])
    assert "call program.gather() on every rank first" in said[0] == said[1]
    assert said[2] == (
        "report.loss: it is of all modules, and rank 0 runs only '0', '1'; the history of program.fit has "
        "the loss"
    )
    assert torch.equal(left, right)


def shared(rank: int, replicas: int, drawing: bool, file: str, start: str = "", epochs: int = 2) -> Any:
    """Train in float64, the last batch of a pass smaller than the others; save the whole program."""
    torch.manual_seed(0)
    model = network(3)
    model[1].append(Centred())
    model.double()
    if not drawing:
        model = nn.Sequential(*[nn.Sequential(*block[:2]) for block in model[:3]], model[3])
    program = locc.compile(
        model, "dgl", SPLITS, example_inputs=batch(4)[0].double(), schedule="pipelined", timeout=20.0, seed=5,
        replicas=replicas, accumulate=2, clip=1.0, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01),
    )  # fmt: skip
    if start:
        program.load(start)
    x = torch.randn(22, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    data = DataLoader(TensorDataset(x, torch.arange(22) % 3), 5 if not drawing else 6, shuffle=True)
    stops = [After(5, False)] if drawing and not start and epochs == 3 else []
    history = program.fit(data, epochs, progress=False, callbacks=stops)
    if drawing and not stops:
        program.step(x[:6], torch.arange(6) % 3)
    state = {n: t.clone() for n, t in program.state_dict().items()}
    program.save(file)
    return state, [epoch.metrics for epoch in history.epochs]


def test_replicas_train_what_one_process_trains(tmp_path: Path) -> None:
    one = shared(0, 1, False, str(tmp_path / "one"))
    every = together(4, shared, 2, False, str(tmp_path / "four"))
    for state, metrics in every:
        assert same(state, every[0][0])
        torch.testing.assert_close(state, one[0], rtol=0, atol=1e-12)
        assert metrics == [pytest.approx(each, abs=1e-12) for each in one[1]]


def test_replicas_draw_from_streams_of_their_own() -> None:
    program = compiled(mlp(), "dgl", ["first"])
    drawn = []
    for replica in (None, SimpleNamespace(number=0), SimpleNamespace(number=1)):
        program.built.executor.replicas = replica  # type: ignore[assignment]
        Eager(program.built.executor, program.plan(), program.bind(*batch(4)), 0).stream("dropout")
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_shares_of_a_batch_do_not_add_up_to_is_refused() -> None:
    def averaging(ir: Any) -> None:
        (h,) = ir.outputs("first")
        ir.assign(
            "first", ir.state("first", "mean", h.meta["spec"]), ir.stop_gradient("first", h, role="now")
        )
        ir.objective(ir.last.name, ir.apply_loss(), "loss")

    with pytest.raises(
        MethodError, match=r"means of gradients .* has state 'mean' of module 'first', of whic"
    ):
        compiled(mlp(), written(averaging), ["first"], schedule="pipelined", replicas=2)


@pytest.mark.slow
def test_replicas_go_on_from_their_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("whole", "first", "second")]
    (one, _), (other, _) = together(2, shared, 2, True, files[0], "", 4)
    assert same(one, other)
    together(2, shared, 2, True, files[1], "", 3)  # cut in the midst of a pass, and of an update
    together(2, shared, 2, True, files[2], files[1], 4)
    assert same(load_file(files[0]), load_file(files[2]))


def test_alone_it_trains_as_lockstep() -> None:
    states = []
    for schedule in ("pipelined", "lockstep"):
        program = compiled(mlp(), "dgl", ["first"], schedule=schedule, optimizer=sgd())
        torch.manual_seed(0)
        program.model.load_state_dict({n: torch.full_like(t, 0.1) for n, t in mlp().state_dict().items()})
        program.fit([batch(5)] * 3, progress=False)
        program.gather()
        states.append(everything(program))
    assert same(*states)


def test_neighbours_share_a_rank_and_the_dearest_rank_is_cheapest() -> None:
    costs = {"a": 3.0, "b": 1.0, "c": 1.0, "d": 4.0, "e": 2.0}
    assert shared_out(costs, 1) == [["a", "b", "c", "d", "e"]]
    assert shared_out(costs, 3) == [["a", "b"], ["c", "d"], ["e"]]
    assert shared_out(costs, 5) == [[name] for name in costs]


def test_a_forecast_adds_up_what_the_modules_take_and_send() -> None:
    takes = {
        name: Cost(2.0, 1.0, {name: (100, (reader,))}) for name, reader in zip("abc", "bcd", strict=True)
    }
    costs = takes | {"d": Cost(2.0, 0.0)}
    # The last rank starts after three halves of a step and three times a second on the way.
    found = forecast(costs, 4, 10, bandwidth=100.0, latency=0.0)
    assert found.seconds == 3 * (1.0 + 1.0) + 10 * 2.0
    assert (found.busy, found.sent) == ([2.0] * 4, [100, 100, 100, 0])
    assert found.bubble == pytest.approx(1 - 10 * 8.0 / (26.0 * 4))
    assert forecast(costs, 1, 10, None, 0.0).seconds == 80.0
    slow = forecast(costs | {"d": Cost(4.0, 0.0)}, 4, 10, None, 0.5)
    assert slow.seconds == 3 * 1.5 + 10 * 4.0
    with pytest.raises(LoccError, match="give 1 to 4 ranks"):
        forecast(costs, 5, 10, None, 0.0)


def test_a_forecast_of_a_program_leaves_it_as_it_was() -> None:
    program = compiled(mlp(dropout=0.3), "dgl", ["first", "second"])
    before = everything(program)
    found = program.forecast(*batch(5), ranks=2, batches=4)
    assert same(before, everything(program))
    assert sum(found.busy) > 0
    assert found.sent[1] == 0 < found.sent[0]
    assert str(found).startswith("2 ranks, 4 batches: ")
    with pytest.raises(MethodError, match="not pipeline-exact"):
        compiled(mlp(), "bp", ["first"]).forecast(*batch(5), ranks=2, batches=4)
