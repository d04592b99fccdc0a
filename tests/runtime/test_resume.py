"""A fit that was cut goes on with the same bits as one that was not."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from locc import LoccError, Program
from locc.runtime.history import History
from locc.runtime.progress import RandomState
from runtime.cut import SCENES, SIGNALS, Augmented, Cut, file_of, killed, seed_everything, validation
from support import batch, compiled, everything, mlp, same, sgd

TESTS = Path(__file__).parents[1]


def told(history: History) -> list[tuple[Any, ...]]:
    """Everything that a history says but how long it took."""
    return [(e.number, e.phase, e.loss, e.objectives, e.validation) for e in history.epochs]


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """Which it does not in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@functools.cache
def uncut(scene: str) -> tuple[list[tuple[Any, ...]], dict[str, Tensor]]:
    """The history of a whole fit, and all that training depends on after it."""
    program = SCENES[scene].program()
    seed_everything(7)
    history = SCENES[scene].fit(program, SCENES[scene].loader(7))
    return told(history), everything(program)


# ---- cut everywhere ----------------------------------------------------------------------------


def fails() -> None:
    raise OSError("the disk is gone")


def stops() -> None:
    raise KeyboardInterrupt


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def ctrl_c_twice() -> None:
    ctrl_c()
    ctrl_c()


# place, what happens there, after how many more steps
ANYWHERE: list[tuple[str, Callable[[], None], int]] = [
    ("in the loader", fails, 1),
    ("in the loader", stops, 1),
    ("early in a step", ctrl_c, 0),
    ("in the validation", fails, 0),
]
UNDONE = [("late in a step", fails, 0), ("late in a step", ctrl_c_twice, 0)]


@pytest.mark.parametrize(
    ("scene", "cuts"),
    [
        ("lockstep", ANYWHERE),
        ("sequential", ANYWHERE),
        ("atomic", [*ANYWHERE, *UNDONE]),
        ("without data", ANYWHERE),
        ("waves", ANYWHERE),
    ],
)
def test_a_fit_that_is_cut_everywhere_ends_with_the_same_bits(scene, cuts, tmp_path):
    """Cut after every step or so; it goes on by turns in the same program and, from a file, in another."""
    wanted, end = uncut(scene)
    programs = [SCENES[scene].program() for _ in range(2)]
    hooks = [Cut(program) for program in programs]
    program, cut = programs[0], hooks[0]
    loader, seen, made = SCENES[scene].loader(7), [], 0
    seed_everything(7)
    for number in range(100):
        place, what, more = cuts[number % len(cuts)]
        cut.set(program.steps + more, place, what)
        try:
            history = SCENES[scene].fit(
                program,
                cut.watched(loader, "in the loader"),
                validation=cut.watched(validation(), "in the validation"),
            )
        except OSError:
            pass
        else:
            found = told(history)
            assert found == wanted[program.epochs - len(found) : program.epochs]
            seen += found
            if not history.interrupted:
                break
        made += 1
        assert program.phase is None or scene == "sequential"
        seed_everything(number)
        if number % 3:
            program.save(tmp_path / "state")
            other = programs.index(program) ^ 1
            program, cut, loader = programs[other], hooks[other], SCENES[scene].loader(number)
            program.load(tmp_path / "state")
    assert len(wanted) < made < 99
    assert seen[-1] == wanted[-1]
    assert same(everything(program), end)


def test_a_fit_that_a_signal_ends_goes_on_in_a_new_process(tmp_path):
    """kill -9 of a fit that writes a checkpoint every two steps, and Ctrl-C of one with workers."""
    done = subprocess.run(
        [sys.executable, "-m", "runtime.cut", str(tmp_path)], cwd=TESTS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, (scene, steps, _, how) in SIGNALS.items():
        program, path = SCENES[scene].program(), file_of(tmp_path, name)
        program.load(path)
        saved = max(steps // 2 * 2, steps // 3 * 3)  # every two steps, and after each pass of three
        assert program.steps == (saved if how is killed else steps + 1), name
        assert program.progress is not None, name
        left = SCENES[scene].fit(program, SCENES[scene].loader(0), checkpoint=path, every=2)
        wanted, end = uncut(scene)
        found = told(left)
        assert found == wanted[-len(found) :], name
        assert len(found) < len(wanted), name
        different = {n for n, value in everything(program).items() if not torch.equal(value, end[n])}
        assert not different, name


class Batches(BatchSampler):
    """A batch sampler with a generator of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(range(10), 4, drop_last=False)
        self.generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.randperm(10, generator=self.generator).split(4))


@pytest.mark.parametrize(
    "make",
    [
        lambda data, g: DataLoader(data, 4, shuffle=True, generator=g),
        lambda data, g: DataLoader(data, None, sampler=RandomSampler(data, generator=g)),
        lambda data, g: DataLoader(data, batch_sampler=Batches(g)),
        lambda data, g: DataLoader(data, 4, num_workers=1, generator=g),
    ],
)
def test_whatever_generator_a_loader_holds_is_put_back(make):
    loader = make(Augmented(), torch.Generator().manual_seed(5))
    state = RandomState.now(loader, torch.device("cpu"))
    first, second = list(loader), list(loader)
    state.restore(loader, torch.device("cpu"))
    again = list(loader)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


# ---- what a user may do next -------------------------------------------------------------------


def plain(**options: Any) -> Program:
    torch.manual_seed(0)
    return compiled(mlp(0.3), "dgl", ["relu1"], optimizer=sgd(0.1), seed=0, verify=False, **options)


def batches(number: int, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(first)
    return [
        (torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(number)
    ]


def stopping(program: Program, data: list[Any], after: int) -> Iterator[Any]:
    """The batches; Ctrl-C before the one that would be step `after`, where it has not been made."""
    for item in data:
        if program.steps == after:
            raise KeyboardInterrupt
        yield item


class Stopping:
    def __init__(self, program: Program, data: list[Any], after: int) -> None:
        self.program, self.data, self.after = program, data, after

    def __iter__(self) -> Iterator[Any]:
        return stopping(self.program, self.data, self.after)


def cut_in(steps: int, data: list[Any], epochs: int, **options: Any) -> Program:
    program = plain(**options)
    assert program.fit(Stopping(program, data, steps), epochs, progress=False).interrupted
    assert program.steps == steps
    return program


def end_of(data: list[Any], epochs: int, **options: Any) -> dict[str, Tensor]:
    program = plain(**options)
    program.fit(data, epochs, progress=False)
    return everything(program)


def test_a_loader_that_has_become_shorter_is_refused_and_the_right_one_goes_on():
    data = batches(4)
    program = cut_in(7, data, 3)
    torch.manual_seed(0)
    before = everything(program)
    with pytest.raises(
        LoccError, match="the loader yields 2 batches, and 3 were done when fit was cut; give"
    ):
        program.fit(data[:2], 3, progress=False)
    torch.manual_seed(0)
    assert same(before, everything(program))
    program.fit(data, 3, progress=False)
    assert same(everything(program), end_of(data, 3))


def test_a_fit_may_go_on_for_longer_than_it_was_asked_to_and_not_for_less():
    data, steps = batches(3), 8
    for schedule in ("lockstep", "sequential"):
        program = cut_in(steps, data, 4, schedule=schedule)
        for epochs in (1, 2):
            with pytest.raises(LoccError, match=rf"epochs={epochs}: a fit of 4 epochs was cut in epoch \d, "):
                program.fit(data, epochs, progress=False)
        assert program.steps == steps
        epochs = 5 if schedule == "lockstep" else 4  # the stages that are over had four
        program.fit(data, epochs, progress=False)
        assert same(everything(program), end_of(data, epochs, schedule=schedule)), schedule


def test_a_fit_that_was_killed_between_two_epochs_goes_on_for_as_long_as_it_was_asked_to(tmp_path):
    data, path = batches(3), tmp_path / "state"
    whole, program = plain(), plain()
    whole.fit(Stopping(whole, data, 6), 4, checkpoint=path, progress=False)
    program.load(path)
    assert program.progress is not None
    assert program.progress.at == (0, 2, 1)  # what is next is not known before the epochs are
    with pytest.raises(LoccError, match="epochs=2: a fit of 4 epochs was cut in epoch 2"):
        program.fit(data, 2, progress=False)
    program.fit(data, 4, progress=False)
    assert same(everything(program), end_of(data, 4))


def test_a_fit_that_is_forgotten_starts_anew():
    data = batches(3)
    program = cut_in(5, data, 2)
    history = program.fit(data, 1, resume=False, progress=False)
    assert [e.number for e in history.epochs] == [1]
    assert program.steps == 8
    assert program.progress is None


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("example", [None, batch()[0]], ids=["compiled by fit", "compiled before"])
def test_a_loader_that_yields_its_batches_once(again, example):
    """The same iterator goes on with what is left in it, a new one with what was not done."""
    data, program = batches(5), plain(example_inputs=example)
    once = iter(data)
    program.model.first.register_forward_pre_hook(lambda *_: ctrl_c() if program.steps == 2 else None)
    assert program.fit(once, progress=False).interrupted
    assert program.steps == 3
    history = program.fit(iter(data) if again else once, progress=False)
    assert same(everything(program), end_of(data, 1))
    assert len(history.epochs) == 1


class Restarting:
    """Its own iterator, which each `iter` starts anew."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __iter__(self) -> Restarting:
        self.left = list(self.data)
        return self

    def __next__(self) -> Any:
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("example", [None, batch()[0]], ids=["compiled by fit", "compiled before"])
def test_a_loader_that_is_its_own_iterator(again, example):
    data, program = batches(4), plain(example_inputs=example)
    loader = Restarting(data)
    program.model.first.register_forward_pre_hook(lambda *_: ctrl_c() if program.steps == 5 else None)
    assert program.fit(loader, 2, progress=False).interrupted
    assert program.steps == 6
    program.fit(Restarting(data) if again else loader, 2, progress=False)
    assert same(everything(program), end_of(data, 2))


def test_a_program_that_fit_compiles_on_a_batch_that_it_draws():
    ends = []
    for stop in (None, 1):
        program, loader = plain(example_inputs=None), DataLoader(TensorDataset(*batch(10)), 4, shuffle=True)
        press = program.model.first.register_forward_pre_hook(
            lambda *_, p=program, stop=stop: ctrl_c() if p.steps == stop else None
        )
        torch.manual_seed(5)
        if program.fit(loader, progress=False).interrupted:
            press.remove()
            torch.manual_seed(6)
            program.fit(loader, progress=False)
        ends.append(everything(program))
    assert same(*ends)


def test_ctrl_c_waits_for_the_end_of_a_pass_as_for_a_step(tmp_path):
    """Between the learning rate of one module and that of the next, say."""
    presses: list[Callable[[], None]] = []

    class Pressed(torch.optim.lr_scheduler.ExponentialLR):
        def step(self, epoch: Any = None) -> None:
            super().step()
            if presses:
                presses.pop()()

    data, path = batches(3), tmp_path / "state"
    program, other = (plain(scheduler=lambda o: Pressed(o, 0.5)) for _ in range(2))
    presses.append(ctrl_c)
    history = program.fit(data, 2, checkpoint=path, progress=False)
    assert history.interrupted
    assert [e.number for e in history.epochs] == [1]
    other.load(path)
    for each in (program, other):
        each.fit(data, 2, progress=False)
        assert same(everything(each), end_of(data, 2, scheduler=lambda o: Pressed(o, 0.5)))


def test_a_loader_may_save_the_program_that_it_trains(tmp_path):
    data, program = batches(4), plain()

    class Saving:
        def __iter__(self) -> Iterator[Any]:
            for item in data:
                if program.steps == 6:
                    program.save(tmp_path / "state")
                yield item

    program.fit(Saving(), 2, progress=False)
    other = plain()
    other.load(tmp_path / "state")
    other.fit(data, 2, progress=False)
    assert other.steps == 8
    assert same(everything(other), everything(program))


def test_the_last_checkpoint_is_of_a_fit_that_is_over(tmp_path):
    """The same call, as a script makes it when it is started again, trains no more; the next one does."""
    data, program, path = batches(3), plain(), tmp_path / "state"
    program.fit(data, 2, checkpoint=path, progress=False)
    other = plain()
    other.load(path)
    assert other.fit(data, 2, checkpoint=path, progress=False).epochs == []
    assert same(everything(other), everything(program))
    assert [e.number for e in other.fit(data, 1, progress=False).epochs] == [1]
    assert other.steps == 9


def test_unusable_checkpoints():
    for options in ({"every": 2}, {"every": 0, "checkpoint": "x"}, {"every": 1.5, "checkpoint": "x"}):
        with pytest.raises(
            LoccError, match=r"every=\d.*: give a number of steps, at least 1, and checkpoint="
        ):
            plain().fit(batches(1), progress=False, **options)


def test_a_data_set_without_a_length(capsys):
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return zip(*batches(1)[0], strict=True)

    program = plain()
    program.fit(DataLoader(Endless(), 2))
    assert program.steps == 3
    assert "epoch 1" in capsys.readouterr().out


def test_the_handler_of_ctrl_c_is_the_users_again():
    seen: list[int] = []

    def press(program: Program) -> None:
        program.model.first.register_forward_pre_hook(lambda *_: ctrl_c() if program.steps == 0 else None)

    program = plain()
    press(program)
    assert program.fit(batches(2), progress=False).interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    program = plain()
    press(program)
    try:
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        assert not program.fit(batches(2), progress=False).interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == [1]


def test_fit_in_a_thread_that_gets_no_signals():
    program = plain()
    thread = threading.Thread(target=lambda: program.fit(batches(2), progress=False))
    thread.start()
    thread.join()
    assert program.steps == 2


def test_under_accumulation_the_learning_rate_advances_with_each_update():
    rates: list[float] = []
    program = plain(accumulate=2, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
    program.model.first.register_forward_pre_hook(
        lambda *_: rates.append(program.optimizers["relu1"].param_groups[0]["lr"])
    )
    program.fit(batches(6), scheduler_interval="step", progress=False)
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
