"""Offload: what waits is in files, and training ends with the bits that it has without."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import locc
from benchmarks import offload as larger
from locc import LoccError, Program, RunError, files
from locc.ir.memory import memory_of
from support import Lent, Tied, everything, same, snapshot, usual_case

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


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let modules visit what is no GPU: the memory of the CPU, beside that in which the model is."""
    monkeypatch.setattr("locc.compiler.device_for", lambda model: torch.device("cpu"))


# ---- the same training -------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in ("bp", "dgl", "fa", "dtp", "al", "altmin", "np-sg")},
    "wave": ("dgl", {"schedule": "wave"}),
    "sequential": ("dgl", {"schedule": "sequential", "features": "memory"}),
    "replay": ("dgl", {"schedule": "replay"}),
    "in_backward": ("dgl", {"update": "in_backward"}),
    "accumulate": ("dgl", {"accumulate": 2}),  # five batches: the last one's gradient waits
}


@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_it_ends_with_the_same_bits(case: str, place: str, visits: None) -> None:
    method, options = CASES[case]
    expected = steps(program(method, **options))
    found = steps(program(method, offload=place, **options))
    assert same(everything(expected), everything(found))
    assert all(in_file(p) == (p.dim() == 2 and place == "disk") for p in found.model.parameters())
    x, _ = batches()[0]
    assert torch.equal(expected.eval().predict(x), found.eval().predict(x))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_it_ends_with_the_same_bits(case: str) -> None:
    method, options = CASES[case]
    expected = steps(program(method, model=network().cuda(), **options))
    found = steps(program(method, offload="cpu", **options))
    assert {p.device.type for p in found.model.parameters()} == {"cpu"}
    assert all(p.is_pinned() for p in found.model.parameters())
    assert same(everything(expected), everything(found))
    x, _ = batches()[0]
    assert torch.equal(expected.eval().predict(x), found.eval().predict(x))


@pytest.mark.gpu
def test_on_a_gpu_what_does_not_fit_there_trains() -> None:
    limit, width, depth = 192 << 20, 1024, 40
    total = torch.cuda.get_device_properties(0).total_memory

    def model() -> nn.Sequential:
        return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)))

    x = torch.randn(8, width)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    torch.cuda.reset_peak_memory_stats()
    try:
        splits = [str(i) for i in range(depth - 1)]
        options: dict[str, Any] = {"loss": "mse", "example_inputs": x, "head": "linear", "verify": False}
        made = locc.compile(model(), "dgl", splits, offload="cpu", optimizer=locc.Recipe(), **options)
        first, *_, last = [float(made.step(x, x).loss) for _ in range(5)]
        assert last < first
        size = 3 * sum(p.nbytes for p in made.root.parameters())  # with two states of Adam
        assert 4 * limit < size < 8 * limit
        assert torch.cuda.max_memory_reserved() <= limit
        with pytest.raises(torch.OutOfMemoryError):
            _ = [p.cuda() for p in made.root.parameters()]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["", "accumulate"])
@pytest.mark.parametrize("first", [True, False], ids=["saved with", "saved without"])
def test_a_checkpoint_goes_on_with_and_without(
    first: bool, options: Any, place: str, tmp_path: Path, visits: None
) -> None:
    with_it = {"offload": place, **options}
    expected = steps(program(**options))
    one = steps(program(**(with_it if first else options)), slice(3))
    one.save(tmp_path / "state")
    other = steps(program(**(options if first else with_it)), slice(1))
    other.load(tmp_path / "state")
    if not first and place == "disk":
        assert all(map(in_file, [*made_of(other, "0"), *made_of(other, "2")]))
    assert same(everything(expected), everything(steps(other, slice(3, None))))


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_it_is_evaluated_exported_and_verified(place: str, tmp_path: Path, visits: None) -> None:
    expected, found = steps(program()), steps(program(offload=place))
    assert found.evaluate(batches()) == expected.evaluate(batches())
    locc.verify(found)
    found.export_onnx(tmp_path / "model.onnx")  # compares with the model
    assert len(list(tmp_path.iterdir())) == (2 if place == "disk" else 1)  # what is in files stays in one
    assert all(in_file(t) == (place == "disk") for t in made_of(found, "0"))
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


def test_what_is_in_files_is_timed_there_and_optimizer_state_returns_to_memory() -> None:
    with locc.deferred():
        model = network()
    made = steps(program(model=model))
    before, seen = everything(made), set()

    def look(*_: Any) -> None:
        seen.update(map(in_file, made_of(made, "0")))

    hook = made.optimizers["1"].register_step_post_hook(look)
    made.forecast(*batches()[0], ranks=2, batches=3)
    hook.remove()
    assert seen == {True}
    assert list(map(in_file, made_of(made, "0"))) == [True, False, False]
    assert same(before, everything(made))


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
        expected += [larger.diagnosed(plain), f"evaluated: {plain.evaluate([larger.batch(-1)])}"]
    assert (
        re.findall(r"^(?:loss|angles:|evaluated:) .*", first.stdout + then.stdout, re.MULTILINE) == expected
    )
    assert len(list((tmp_path / "large" / "modules").glob("*.onnx"))) == larger.DEPTH + 1
    assert (tmp_path / "large" / "model.onnx").exists()
    without = run("memory", str(tmp_path))
    assert without.returncode == 1
    assert "can't allocate memory" in without.stderr
    assert "compiled" not in without.stdout


# ---- what visits a device ----------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Fails where an operator reads or writes one of some tensors, but for those that move them."""

    def __init__(self, made: Program, tensors: list[Tensor]) -> None:
        super().__init__()
        self.homes, self.moving = {memory_of(t) for t in tensors}, False
        self.offload: Any = made.built.executor.offload
        self.moves = {name: getattr(self.offload, name) for name in ("_change", "rest")}
        for name, move in self.moves.items():
            setattr(self.offload, name, partial(self.moved, move))

    def moved(self, move: Any, *given: Any) -> None:
        self.moving = True
        move(*given)
        self.moving = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a view touches no memory
        if not self.moving and not function.is_view:
            for found in tree_leaves((args, kwargs)):
                if isinstance(found, Tensor):
                    assert memory_of(found) not in self.homes, f"{function} on what is not on the device"
        return function(*args, **(kwargs or {}))


def of(made: Program, tensor: Tensor) -> str:
    """The module that has a tensor, or whose optimizer does."""
    for name, optimizer in made.optimizers.items():
        if any(tensor is t for t in tree_leaves([list(optimizer.state.values()), optimizer.param_groups])):
            return name
    found = {id(b): path for path, b in made.model.named_buffers()}
    return found[id(tensor)].partition(".")[0]


def travelling(made: Program) -> list[Tensor]:
    """Every parameter and buffer, and what the optimizers have of more than one number."""
    states = [t for o in made.optimizers.values() for t in tree_leaves(list(o.state.values()))]
    held = [*made.root.parameters(), *made.root.buffers(), *(t for t in states if t.dim())]
    return [t for t in held if t.untyped_storage().nbytes()]


@pytest.mark.parametrize("kind", ["bp", "dgl", "dtp", "al", "cdni", Tied, Lent])
def test_an_owner_computes_with_what_is_on_the_device_alone(kind: Any, visits: None) -> None:
    if isinstance(kind, str):
        case = usual_case(kind)
        made = case.compile(offload="cpu", verify=False)
        data = [case.batch(number) for number in range(3)]
    else:
        data = [(torch.ones(2, 3).long(),) * 2] * 3
        options: dict[str, Any] = {"tied": "owner", "example_inputs": data[0][0], "offload": "cpu"}
        made = locc.compile(kind(), "bp", ["embed", "mid"], **options)
    for x, y in data:
        with Watched(made, travelling(made)):
            made.step(x, y)
    made.eval()
    with Watched(made, travelling(made)):
        made.predict(data[0][0])


def test_the_module_that_trains_and_the_next_one_are_on_the_device(visits: None) -> None:
    made = steps(program(offload="cpu"))
    size = {name: sum(t.nbytes for t in travelling(made) if of(made, t) == name) for name in ("0", "1", "2")}
    offload: Any = made.built.executor.offload
    found: dict[str, int] = {}

    def look(instruction: Any, values: Any) -> None:
        there = {id(b): b.away.nbytes() for b in offload._berths.values()}
        found[instruction.owner] = max(found.get(instruction.owner, 0), sum(there.values()))

    made.built.executor.observe = look
    steps(made, slice(2))
    assert found == {"0": size["0"] + size["1"], "1": size["1"] + size["2"], "2": size["2"]}
    assert not offload._berths


def test_what_an_optimizer_makes_goes_home(visits: None) -> None:
    made = program(offload="cpu")
    there: dict[str, set[int]] = {}

    def look(instruction: Any, values: Any) -> None:
        learner = made.built.learners[instruction.owner]
        there[instruction.owner] = {memory_of(t) for t in tree_leaves(list(learner.optimizer.state.values()))}

    made.built.executor.observe = look
    steps(made, slice(1))
    home = {memory_of(t) for t in travelling(made)}
    assert len(there) == 3
    assert all(found and not found & home for found in there.values())


def test_a_tape_does_not_keep_the_device_memory_of_what_is_away(visits: None) -> None:
    made = steps(program("bp", offload="cpu"), slice(1))
    weight = made.model.get_submodule("0.0").weight
    seen = []

    def look(instruction: Any, values: Any) -> None:
        berths = made.built.executor.offload._berths
        seen.append((instruction.owner, berths[memory_of(weight)].away.nbytes() > 0))

    made.built.executor.observe = look
    steps(made, slice(1))
    assert ("2", False) in seen
    assert seen[-1] == ("0", True)


def test_a_step_that_stops_leaves_the_model_whole(visits: None) -> None:
    made = steps(program(offload="cpu"))
    x, y = batches()[0]

    def look(instruction: Any, values: Any) -> None:
        if instruction.owner == "1":
            raise KeyboardInterrupt

    made.built.executor.observe = look
    with pytest.raises(KeyboardInterrupt):
        made.step(x, y)
    made.built.executor.observe = None
    assert torch.equal(made.eval().predict(x), made.model(x))
    with pytest.raises(RunError, match=r"call program\.eval\(\) first"):
        made.train().predict(x)
    steps(made)


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


def test_a_disk_that_is_full_while_compiling_is_no_fault_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backward = torch.autograd.grad

    def with_gradients_of(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            return backward(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", with_gradients_of)
    with pytest.raises(LoccError, match=r"^offload='disk' needs files"):
        program(offload="disk")


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
        (
            {"offload": "cpu"},
            "offload='cpu' takes what waits for its turn on a GPU .* there is no CUDA device",
        ),
        ({"offload": "/nowhere"}, "offload='/nowhere' is neither 'disk' nor 'cpu' nor an existing folder"),
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
