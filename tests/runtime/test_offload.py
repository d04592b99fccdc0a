"""Offload: what waits is in files, and training ends with the bits that it has without."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from benchmarks import offload as larger
from locc import LoccError, Program, files
from support import everything, same, snapshot

WIDTH = 40
"""A matrix is more than a page, what has one number a unit is less."""
SPLITS = ["0", "1"]
HOME = Path(__file__).parents[2]


def network() -> nn.Sequential:
    torch.manual_seed(0)

    def block() -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2))

    return nn.Sequential(block(), block(), nn.Linear(WIDTH, 30))


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    draw = torch.randn(count, 6, WIDTH, generator=generator)
    return [(x, torch.randint(30, (6,), generator=generator)) for x in draw]


def program(method: str = "dgl", model: nn.Module | None = None, **options: Any) -> Program:
    options.setdefault("optimizer", lambda ps: torch.optim.Adam(ps, lr=0.01))
    model = network() if model is None else model
    return locc.compile(
        model, method, SPLITS, example_inputs=batches()[0][0], seed=1, verify=False, **options
    )


def steps(made: Program, part: slice = slice(None)) -> Program:
    if made.settings.schedule == "sequential":
        made.fit(batches()[part], epochs=2, progress=False)
    elif made.settings.wave:
        made.wave(batches()[part])
    else:
        for x, y in batches()[part]:
            made.step(x, y)
    return made


def made_of(made: Program, name: str) -> list[Tensor]:
    """The matrices of a module, and those of its optimizer."""
    weight = made.model.get_submodule(name).get_parameter("weight" if name == "2" else "0.weight")
    (state,) = [o.state[weight].values() for o in made.optimizers.values() if weight in o.state]
    return [weight, *(t for t in state if t.dim() == 2)]


def in_file(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def resident() -> set[int]:
    """The addresses of what is mapped and, in part at least, in this process's memory."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    there = (part for part in parts[1:] if not re.search("\nRss: +0 kB", part))
    return {int(part.partition("-")[0], 16) for part in there}


# ---- the same training -------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in ("bp", "dgl", "fa", "dtp", "al", "altmin")},
    "wave": ("dgl", {"schedule": "wave"}),
    "sequential": ("dgl", {"schedule": "sequential", "features": "memory"}),
    "replay": ("dgl", {"schedule": "replay"}),
    "in_backward": ("dgl", {"update": "in_backward"}),
    "accumulate": ("dgl", {"accumulate": 2}),  # five batches: the last one's gradient waits
}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_with_the_same_bits(case: str, tmp_path: Path) -> None:
    method, options = CASES[case]
    expected = steps(program(method, **options))
    found = steps(program(method, offload=tmp_path, **options))
    assert same(everything(expected), everything(found))
    assert all(in_file(p) == (p.dim() == 2) for p in found.model.parameters())
    x, _ = batches()[0]
    assert torch.equal(expected.eval().predict(x), found.eval().predict(x))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["", "accumulate"])
@pytest.mark.parametrize("first", [True, False], ids=["saved with", "saved without"])
def test_a_checkpoint_goes_on_with_and_without(first: bool, options: Any, tmp_path: Path) -> None:
    with_it = {"offload": "disk", **options}
    expected = steps(program(**options))
    one = steps(program(**(with_it if first else options)), slice(3))
    one.save(tmp_path / "state")
    other = steps(program(**(options if first else with_it)), slice(1))
    other.load(tmp_path / "state")
    if not first:
        assert all(map(in_file, [*made_of(other, "0"), *made_of(other, "2")]))
    assert same(everything(expected), everything(steps(other, slice(3, None))))


def test_it_is_evaluated_exported_and_verified(tmp_path: Path) -> None:
    expected, found = steps(program()), steps(program(offload=tmp_path))
    assert found.evaluate(batches()) == expected.evaluate(batches())
    locc.verify(found)
    found.export_onnx(tmp_path / "model.onnx")  # compares with the model
    assert all(map(in_file, made_of(found, "0")))
    assert same(everything(expected), everything(found))


# ---- what is in memory -------------------------------------------------------------------------


def test_one_module_at_a_time_is_in_memory() -> None:
    made = steps(program(offload="disk"))
    held = {name: made_of(made, name) for name in ("0", "1", "2")}
    assert {len(tensors) for tensors in held.values()} == {3}
    met = set()

    def look(instruction: Any, values: Any) -> None:
        there = resident()
        found = (n for n, tensors in held.items() if any(t.data_ptr() in there for t in tensors))
        met.add((instruction.owner, *found))

    made.built.executor.observe = look
    steps(made, slice(1))
    assert met == {(name, name) for name in held}


def test_the_module_that_is_next_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = steps(program("bp", offload="disk"), slice(2))
    names = {id(made_of(made, name)[0]): name for name in ("0", "1", "2")}
    said = []

    def note(tensors: list[Tensor], advice: int) -> None:
        if advice == mmap.MADV_WILLNEED:
            said.append(next(names[id(t)] for t in tensors if id(t) in names))

    monkeypatch.setattr(files, "advise", note)
    steps(made, slice(1))
    # forward 0, 1, 2 and back 1, 0, where the next step begins as well: 0 is there, and 1 comes
    assert said == ["2", "1", "0", "1"]


def test_gradients_that_wait_are_in_files() -> None:
    made = steps(program(accumulate=2, offload="disk"), slice(3))
    assert [in_file(made_of(made, name)[0].grad) for name in ("0", "1")] == [True, True]


def test_tensors_in_one_storage_stay_so(tmp_path: Path) -> None:
    model = network()
    model[0].register_buffer("seen", model[0][0].weight.detach()[:1])
    made = steps(program(model=model, offload="disk"))
    made.save(tmp_path / "state")
    steps(made)
    made.load(tmp_path / "state")
    assert torch.equal(model[0].seen[0], model[0][0].weight[0])
    assert in_file(model[0].seen)


def test_no_file_has_a_name_and_none_is_left(tmp_path: Path) -> None:
    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(f"{tmp_path}/")

    made = steps(program(offload=tmp_path))
    count = mapped()
    made.save(tmp_path / "state")
    made.load(tmp_path / "state")
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert mapped() == count > 0
    del made
    assert mapped() == 0


@pytest.mark.slow
def test_eight_times_the_memory_there_is(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        # Freed memory goes back at once, so that the limit is on what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        words = (sys.executable, "-m", "benchmarks.offload", "limited", *words)
        return subprocess.run(words, cwd=HOME, env=environment, capture_output=True, text=True, check=False)

    first, then = run("disk", str(tmp_path)), run("disk", str(tmp_path), "--resume")
    assert (first.returncode, then.returncode) == (0, 0), first.stderr + then.stderr
    plain = larger.compiled(verify=False)
    expected = []
    for _ in range(2):
        expected += [f"loss {float(plain.step(*larger.batch(plain.steps)).loss)}" for _ in range(2)]
        expected.append(f"evaluated: {plain.evaluate([larger.batch(-1)])}")
    assert re.findall(r"^(?:loss|evaluated:) .*", first.stdout + then.stdout, re.MULTILINE) == expected
    assert len(list((tmp_path / "large" / "modules").glob("*.onnx"))) == larger.DEPTH + 1
    without = run("memory", str(tmp_path))
    assert without.returncode == 1
    assert "can't allocate memory" in without.stderr
    assert "compiled" not in without.stdout


# ---- refusals ----------------------------------------------------------------------------------


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_met_before_anything_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = network()
    before, calls = snapshot(model), iter([None, None])
    monkeypatch.setattr(os, "posix_fallocate", lambda *a: next(calls, 0) is None or full())
    with pytest.raises(LoccError, match=rf"offload='{tmp_path}' needs files of \d+ bytes .*No space left"):
        program(model=model, offload=tmp_path)
    assert same(before, snapshot(model))
    assert not any(map(in_file, model.parameters()))


def test_a_disk_that_gets_full_stops_the_step_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(offload="disk")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(LoccError, match="No space left") as caught:
            steps(made)
    assert caught.value.__notes__ == [
        "locc: the step stopped. Updated before that: '0'; compile with atomic=True to undo them as well"
    ]
    steps(made)
    assert all(map(in_file, made_of(made, "0")))


class Odd(nn.Sequential):
    """Has a buffer that cannot lie in a file."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__(*network())
        self.register_buffer("odd", buffer)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"offload": "cpu"}, "offload='cpu', from a GPU to the memory of the CPU, is not available"),
        ({"offload": "/nowhere"}, "offload='/nowhere' is neither 'disk' nor an existing folder"),
        (
            {"offload": "/proc"},
            "offload='/proc' needs files of 17600 bytes more, and there is no room or no file",
        ),
        ({"atomic": True}, "atomic=True keeps a copy of everything there"),
        (
            {"model": Odd(torch.zeros(2, dtype=torch.complex64).conj())},
            "'odd' is no plain tensor",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:12],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LoccError, match=says):
        program(**{"offload": "disk", **options})


def test_a_program_stays_on_the_cpu() -> None:
    made = program(offload="disk")
    with pytest.raises(LoccError, match="the model is asked to be on meta"):
        made.to("meta")
    steps(made)
    made.model.to("meta")
    with pytest.raises(LoccError, match="the model is asked to be on meta"):
        steps(made)
