from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import locc
from locc import CheckpointError, Program
from locc.runtime import checkpoint
from support import batch, everything, same, snapshot


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def build(splits: Any = ("3", "5"), method: str = "bp", optimizer: Any = None, **options: Any) -> Program:
    optimizer = optimizer or (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9))
    options.setdefault("example_inputs", batch()[0])
    return locc.compile(model(), method, splits, optimizer=optimizer, seed=1, **options)


def unchanged(program: Program, before: dict[str, Tensor]) -> bool:
    return same(before, everything(program))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
    "fused": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01), fused=True),
    "adamw": lambda ps: torch.optim.AdamW(
        [{"params": ps[:1], "weight_decay": 0.0}, {"params": ps[1:]}], lr=0.01
    ),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, name, accumulate):
    """With dropout, BatchNorm, a scheduler, and in the middle of an accumulation."""

    def new() -> Program:
        return build(
            optimizer=OPTIMIZERS[name],
            accumulate=accumulate,
            clip=1.0,
            scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        )

    def run(program: Program, data: Any) -> None:
        for x, y in data:
            program.step(x, y)
            for scheduler in program.schedulers.values():
                scheduler.step()

    data = batches(8)
    whole = new()
    run(whole, data)
    first = new()
    run(first, data[:4])
    first.save(tmp_path / "state")
    second = new()
    run(second, data[5:6])  # leave a state behind that loading must overwrite
    second.load(tmp_path / "state")
    assert unchanged(second, everything(first))
    run(second, data[4:])
    assert second.steps == 8
    assert unchanged(second, everything(whole))


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path):
    program = build()
    program.save(tmp_path / "state")
    before = everything(program)
    program.step(*batch())
    program.load(tmp_path / "state")
    assert unchanged(program, before)
    assert all(not optimizer.state for optimizer in program.optimizers.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
        ),
    ],
)
def test_schedulers_resume(tmp_path, make):
    data = batches(3)
    whole, first, second = (build(scheduler=make) for _ in range(3))
    whole.fit(data, epochs=6, progress=False)
    first.fit(data, epochs=3, progress=False)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    second.fit(data, epochs=3, progress=False)
    assert second.epochs == 6
    for name in whole.optimizers:
        assert [g["lr"] for g in whole.optimizers[name].param_groups] == [
            g["lr"] for g in second.optimizers[name].param_groups
        ]
    assert same(snapshot(whole.model), snapshot(second.model))


def test_the_users_random_state_is_resumed(tmp_path):
    program = build()
    torch.manual_seed(5)
    program.save(tmp_path / "state")
    expected = torch.rand(3)
    program.load(tmp_path / "state")
    assert torch.equal(torch.rand(3), expected)


def test_sequential_resumes_in_its_phase(tmp_path):
    program = build(method="dgl", schedule="sequential")
    program.phase = program.phases[1].name
    program.save(tmp_path / "state")
    other = build(method="dgl", schedule="sequential")
    other.load(tmp_path / "state")
    assert other.phase == program.phases[1].name


# ---- refusals ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Program, Path]:
    program = build()
    program.step(*batch())
    path = tmp_path / "state"
    program.save(path)
    program.step(*batch())
    return program, path


def test_a_file_torn_anywhere_is_named_and_nothing_changes(saved):
    program, path = saved
    content = path.read_bytes()
    before = everything(program)
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"state' is torn or no safetensors file"):
            program.load(path)
    path.write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match="torn or no safetensors"):
        program.load(path)
    assert unchanged(program, before)


def test_a_flipped_bit_anywhere_is_found(saved):
    program, path = saved
    content = path.read_bytes()
    before = everything(program)
    for at in range(0, len(content), max(1, len(content) // 300)):
        for bit in (0x01, 0x10):
            path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            with pytest.raises(CheckpointError):
                program.load(path)
    assert unchanged(program, before)
    path.write_bytes(content)
    program.load(path)


def test_foreign_files_are_named(saved, tmp_path):
    program, _ = saved
    before = everything(program)
    foreign = tmp_path / "foreign"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(CheckpointError, match="locc did not write it"):
        program.load(foreign)
    save_file({"weight": torch.ones(2)}, foreign, metadata={"locc": "{}"})
    with pytest.raises(CheckpointError, match="foreign' is damaged"):
        program.load(foreign)
    torch.save(program.model.state_dict(), foreign)
    with pytest.raises(CheckpointError, match="torn or no safetensors file"):
        program.load(foreign)
    foreign.write_text("weights, honestly")
    with pytest.raises(CheckpointError, match="torn or no safetensors file"):
        program.load(foreign)
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="there is no checkpoint at"):
            program.load(missing)
    assert unchanged(program, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dgl"}, "saved by another program .*method 'bp'.*this one is method 'dgl'"),
        ({"splits": ["3"]}, r"saved by another program .*modules 3, 5, 6"),
        ({"optimizer": OPTIMIZERS["adam"]}, "saved with the optimizers .*SGD.* and this program has .*Adam"),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)},
            "schedulers none, and this program has",
        ),
        (
            {"optimizer": lambda ps: torch.optim.SGD([{"params": [p]} for p in ps], lr=0.1)},
            "does not fit this program",
        ),
    ],
)
def test_the_state_of_another_program(saved, options, message):
    _, path = saved
    program = build(**options)
    program.step(*batch())
    before = everything(program)
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        program.load(path)
    assert unchanged(program, before)
    assert torch.equal(state, torch.get_rng_state())
    program.step(*batch())


def test_another_width_is_another_program(saved):
    _, path = saved
    net = model()
    net[-1] = nn.Linear(8, 5)
    other = locc.compile(net, "bp", ["3", "5"], example_inputs=batch()[0])
    with pytest.raises(CheckpointError, match=r"another program|does not fit"):
        other.load(path)


def test_another_precision_does_not_fit(saved):
    _, path = saved
    other = locc.compile(model().double(), "bp", ["3", "5"], example_inputs=batch(dtype=torch.float64)[0])
    with pytest.raises(CheckpointError, match=r"another program|in the file"):
        other.load(path)


def test_an_incomplete_program_says_what_to_do(saved):
    _, path = saved
    fresh = locc.compile(model(), "bp", ["3", "5"])
    for act in (fresh.load, fresh.save):
        with pytest.raises(locc.RunError, match="pass example_inputs to compile, or run a step first"):
            act(path)


def test_a_state_that_json_cannot_keep(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p]["odd"] = object()

    program = build(optimizer=lambda ps: Odd(ps, lr=0.1))
    program.step(*batch())
    with pytest.raises(
        CheckpointError, match="optimizer of '3' holds a object, which a checkpoint without pickle"
    ):
        program.save(tmp_path / "state")
    assert not list(tmp_path.iterdir())


# ---- an interrupted save -----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["save_file", "fsync", "replace", "interrupt"])
def test_a_failing_save_harms_nothing_and_leaves_nothing_behind(saved, monkeypatch, place):
    program, path = saved
    content = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt if place == "interrupt" else OSError(28, "No space left on device")

    if place == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    else:
        monkeypatch.setattr(os, "replace" if place == "interrupt" else place, fail)
    expected = KeyboardInterrupt if place == "interrupt" else CheckpointError
    with pytest.raises(expected):
        program.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["state"]
    program.load(path)


def test_a_folder_that_does_not_exist_or_is_in_the_way(saved, tmp_path):
    program, _ = saved
    with pytest.raises(CheckpointError, match=r"the folder '.*missing' does not exist"):
        program.save(tmp_path / "missing" / "state")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot save to '.*folder'"):
        program.save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "state"]


@pytest.fixture
def parted(saved: tuple[Program, Path]) -> tuple[Program, Path, Path]:
    """Return a program, the folder that it was saved to, and the file there; it has trained on since."""
    program, path = saved
    folder = path.with_name("parts")
    program.load(path)
    for _ in range(2):
        program.save(f"{folder}/")
    (part,) = folder.glob("step-1-*/*.safetensors")
    program.step(*batch())
    return program, folder, part


def test_a_folder_keeps_what_a_file_does(parted):
    program, folder, part = parted
    program.load(folder.with_name("state"))
    before = everything(program)
    program.step(*batch())
    (folder / "step-2-of-a-process-that-was-killed").mkdir()
    program.load(folder)
    assert unchanged(program, before)
    program.save(folder)  # a checkpoint is in it
    assert len(list(folder.iterdir())) == 2
    assert not part.exists()
    assert b"pickle" not in b"".join(f.read_bytes() for f in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("broken", ["os.replace", "torch.distributed.checkpoint.filesystem.os.fsync"])
def test_a_folder_that_cannot_be_written_is_as_before(broken, parted, monkeypatch):
    program, folder, _ = parted

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(broken, full)
    with pytest.raises(CheckpointError, match=r"parts': .*no space left.* unharmed"):
        program.save(folder)
    monkeypatch.undo()
    assert len(list(folder.iterdir())) == 2
    program.load(folder)
    assert program.steps == 1
    with pytest.raises(
        CheckpointError, match=r"cannot save to '.*parts': the folder '.*missing' does not exist"
    ):
        program.save(f"{folder.parent}/missing/parts/")


def test_a_part_that_is_damaged_or_missing_is_named(parted):
    program, folder, part = parted
    before = everything(program)
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="parts' is damaged"):
        program.load(folder)
    part.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="parts' is torn"):
        program.load(folder)
    part.unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        program.load(folder)
    assert unchanged(program, before)


def test_the_file_holds_no_pickle_and_ordinary_permissions(saved):
    _, path = saved
    assert b"pickle" not in path.read_bytes()
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


# ---- the loss ----------------------------------------------------------------------------------


def scaled(factor: float) -> Any:
    return lambda output, target: functional.cross_entropy(output, target) * factor


def held_in(value: Any) -> Any:
    return lambda output, target: functional.cross_entropy(output, target) + 0 * (value is None)


class Smooth:
    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, output: Any, target: Any) -> Any:
        return functional.cross_entropy(output, target, label_smoothing=self.amount)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda o, y: functional.cross_entropy(o, y), lambda o, y: functional.cross_entropy(o, y) * 2),
        (lambda o, y: functional.cross_entropy(o, y) * 3, lambda o, y: functional.cross_entropy(o, y) * 2),
        (scaled(1.0), scaled(2.0)),
        (partial(functional.cross_entropy, label_smoothing=0.1), partial(functional.cross_entropy)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss()),
        (nn.CrossEntropyLoss(torch.ones(3)), nn.CrossEntropyLoss(torch.arange(3.0))),
        (Smooth(0.1), Smooth(0.2)),
        (held_in([1, 2]), held_in([1, 3])),
    ],
    ids=["code", "constant", "closure", "partial", "module", "buffer", "instance", "list"],
)
def test_another_loss_is_told_from_the_one_that_was_saved(tmp_path, one, other):
    path = tmp_path / "state"
    first = build(loss=one, verify=False)
    first.save(path)
    again = build(loss=one, verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load(path)
    program = build(loss=other, verify=False)
    before = everything(program)
    with pytest.raises(CheckpointError, match=r"saved with another loss, .* Compile with the same loss"):
        program.load(path)
    assert unchanged(program, before)


def test_what_a_loss_holds_and_cannot_be_compared_is_named(tmp_path):
    program = build(loss=held_in(object()), verify=False)
    program.save(tmp_path / "state")
    with pytest.warns(UserWarning, match=r"cannot be told: only the type is compared .* 'value' \(object\)"):
        program.load(tmp_path / "state")


def test_a_loss_may_hold_the_model_which_has_other_values_in_each_run(tmp_path):
    build(loss=held_in(nn.Linear(2, 2)), verify=False).save(tmp_path / "state")
    build(loss=held_in(nn.Linear(2, 2)), verify=False).load(tmp_path / "state")
