from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import locc
from benchmarks.meter import peak_memory
from locc import Program, RunError
from locc.runtime import streams
from runtime.turns import norms
from support import Residual, batch, compiled, mlp, same, sgd, snapshot

F64 = torch.float64


def eager_gap(program: Program, eager: nn.Module) -> float:
    pairs = zip(program.model.state_dict().values(), eager.state_dict().values(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs)


# ---- inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 17])
def test_other_batch_sizes(size):
    model = Residual().double()
    eager = copy.deepcopy(model)
    program = compiled(model, "bp", ["blocks.*"], optimizer=sgd())
    x, y = batch(size, F64)
    report = program.step(x, y)
    loss = functional.cross_entropy(eager(x), y)
    loss.backward()
    sgd()(eager.parameters()).step()
    assert abs(report.loss.item() - loss.item()) < 1e-12
    assert eager_gap(program, eager) < 1e-12


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, image: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.a(image)) * scale
        return self.b(h if shift is None else h + shift)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 7), r"input 'input' was compiled as f32\[B,4\] and now is f32\[5,7\]"),
        (torch.zeros(5, 4, 1), r"input 'input' was compiled as f32\[B,4\]"),
        (torch.zeros(5, 4, dtype=F64), r"input 'input' was compiled as f32\[B,4\] and now is f64\[5,4\]"),
        ((torch.zeros(5, 4), torch.zeros(5, 4)), "the inputs differ from the example inputs"),
        (None, "the inputs differ from the example inputs"),
        ("text", "the inputs differ from the example inputs"),
    ],
)
def test_other_inputs_are_refused(x, message):
    program = compiled(mlp(), "bp", ["first"])
    before = snapshot(program.model)
    with pytest.raises(RunError, match=message):
        program.step(x, batch()[1])
    assert same(before, snapshot(program.model))
    program.step(*batch())


def test_a_missing_or_new_keyword_is_refused_by_name():
    example = {"image": torch.zeros(5, 4), "scale": torch.ones(5, 6)}
    program = locc.compile(Keywords(), "bp", ["a"], example_inputs=example)
    y = batch()[1]
    program.step(example, y)
    with pytest.raises(RunError, match="scale"):
        program.step({"image": torch.zeros(5, 4)}, y)
    with pytest.raises(RunError, match="shift"):
        program.step({**example, "shift": torch.zeros(5, 6)}, y)
    with pytest.raises(RunError, match=r"input 'scale' was compiled as f32\[B,6\] and now is f32\[5,2\]"):
        program.step({**example, "scale": torch.ones(5, 2)}, y)


def test_eval_mode_is_refused():
    program = compiled(mlp(), "bp", ["first"])
    for mode in (program.eval, program.model.eval):
        mode()
        with pytest.raises(RunError, match=r"in eval mode; call program.train\(\)"):
            program.step(*batch())
        program.train()
    program.step(*batch())


def test_inference_mode_is_refused_and_no_grad_is_not():
    program = compiled(mlp(), "bp", ["first"])
    with torch.inference_mode(), pytest.raises(RunError, match=r"inference_mode\(\) cannot train"):
        program.step(*batch())
    before = snapshot(program.model)
    with torch.no_grad():
        program.step(*batch())
    assert not same(before, snapshot(program.model))


def test_a_copy_of_a_program_does_not_train_the_original():
    program = compiled(mlp(), "bp", ["first"])
    twin = copy.deepcopy(program)
    with pytest.raises(RunError, match=r"a copy of a program.*copy program.model and compile again"):
        twin.step(*batch())


def test_a_program_is_saved_and_not_pickled():
    with pytest.raises(RunError, match=r"cannot be pickled: program.save\(path\)"):
        pickle.dumps(compiled(mlp(), "bp", ["first"]))


# ---- parameters --------------------------------------------------------------------------------


def test_clipping_is_per_module_and_on_the_mean_gradient():
    model = mlp().double()
    eager = copy.deepcopy(model)
    x, y = batch(6, F64)
    program = compiled(model, "bp", ["relu1", "relu2"], optimizer=sgd(), clip=0.01, accumulate=2)
    program.step(x[:3], y[:3])
    program.step(x[3:], y[3:])
    functional.cross_entropy(eager(x), y).backward()
    for name in ("first", "second", "third"):
        layer = eager.get_submodule(name)
        assert nn.utils.clip_grad_norm_(layer.parameters(), 0.01) > 0.01
    sgd()(eager.parameters()).step()
    assert eager_gap(program, eager) < 1e-12


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    tokens = torch.randint(11, (5, 2))
    program = locc.compile(model, "bp", ["1"], example_inputs=tokens, optimizer=sgd(), accumulate=2)
    before = model[0].weight.clone()
    program.step(tokens, batch()[1])
    program.step(tokens, batch()[1])
    assert not torch.equal(before, model[0].weight)


# ---- precision, device -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_autocast_runs_the_forward_in_low_precision(dtype):
    seen: list[torch.dtype] = []
    model = mlp()
    model.get_submodule("second").register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    program = compiled(model, "dgl", ["relu1", "relu2"], autocast=dtype, optimizer=sgd(0.5))
    seen.clear()
    x = batch(32)[0]
    losses = [float(program.step(x, (x[:, 0] > 0).long()).loss) for _ in range(60)]
    assert set(seen) == {torch.bfloat16}
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_users_own_autocast_sees_every_update():
    """Its cache of cast weights must not outlive an update, or a stretch without a tape."""
    torch.manual_seed(0)
    model = mlp()
    twin = copy.deepcopy(model)
    mine = compiled(model, "dgl", ["relu1", "relu2"], autocast="bfloat16", optimizer=sgd(0.5), seed=0)
    theirs = compiled(twin, "dgl", ["relu1", "relu2"], optimizer=sgd(0.5), seed=0)
    for _ in range(5):
        mine.step(*batch(32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(5):
            theirs.step(*batch(32))
    assert same(snapshot(model), snapshot(twin))


def test_to_keeps_training_and_refuses_another_precision():
    program = compiled(mlp(), "bp", ["first"])
    program.step(*batch())
    assert program.to("cpu") is program
    program.step(*batch())
    before = snapshot(program.model)
    for cast in (program.double, program.half, lambda: program.to(torch.bfloat16)):
        with pytest.raises(
            locc.LoccError, match=r"compiled for torch.float32; cast the model before compiling"
        ):
            cast()
    assert same(before, snapshot(program.model))
    program.float().step(*batch())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["model first", "program", "model later"])
@pytest.mark.parametrize("method", ["bp", "dgl", "dtp"])
def test_cuda(how, method):
    def train(device: str) -> list[float]:
        torch.manual_seed(0)
        model = mlp().double()
        if how == "model first":
            model.to(device)
        program = compiled(model, method, ["relu1", "relu2"], seed=0, example_inputs=batch(dtype=F64)[0])
        program.step(*batch(dtype=F64))
        if how == "program":
            program.to(device)
        if how == "model later":
            model.to(device)
        losses = [float(program.step(*batch(dtype=F64)).loss) for _ in range(3)]
        assert {p.device.type for p in program.parameters()} == {device}
        return losses

    # a method that draws noise draws another one on the device
    assert train("cuda") == pytest.approx(train("cpu"), abs=1e-8 if method == "bp" else 10)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "as_in"),
    [
        ({"schedule": "wave"}, {}),
        ({"schedule": "sequential", "features": "memory"}, {"schedule": "sequential"}),
        ({"update": "in_backward"}, {}),
        ({"recompute": ["a.0", "b.0"]}, {}),
        ({"offload": "cpu"}, {}),
        ({"backend": "cudagraphs"}, {}),
    ],
    ids=["wave", "sequential", "in_backward", "recompute", "offload", "cudagraphs"],
)
@pytest.mark.parametrize("method", ["bp", "dgl", "predsim"])
def test_cuda_ends_with_the_same_bits(method, options, as_in):
    if method == "bp" and options.get("schedule"):
        pytest.skip("neither is for bp")

    def train(**given: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        program = compiled(norms().cuda(), method, ["a", "b"], seed=1, optimizer=locc.Recipe(), **given)
        x, y = batch(8)
        data = [(x * (1 + i), y) for i in range(6)]
        program.fit(data, epochs=2, progress=False)
        return {name: tensor.cpu() for name, tensor in program.state_dict().items()}

    assert same(train(**options), train(**as_in))


@pytest.mark.gpu
def test_cuda_holds_the_activations_and_gradients_of_one_module():
    def peak(method: str, splits: list[str]) -> int:
        layers = [nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(8)]
        x, y = torch.randn(2048, 512).cuda(), torch.randint(10, (2048,)).cuda()
        model = nn.Sequential(*layers, nn.Linear(512, 10)).cuda()
        program = compiled(model, method, splits, optimizer=locc.Recipe(), example_inputs=x, verify=False)
        for _ in range(2):
            program.step(x, y)
        return peak_memory(lambda: program.step(x, y), "cuda")

    assert peak("dgl", [str(i) for i in range(8)]) < 0.5 * peak("bp", [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_defers_the_error_and_skips_the_update():
    mode: dict[str, Any] = {}
    program = compiled(
        mlp().cuda(),
        "dgl",
        ["relu1"],
        optimizer=lambda ps: torch.optim.Adam(ps, fused=True),
        loss=flaky(mode),
    )
    x, y = batch()
    program.step(x, y)
    mode["factor"] = float("nan")
    before = snapshot(program.model)
    program.step(x, y)
    assert same(before, snapshot(program.model))
    with pytest.raises(RunError, match="objective"):
        program.built.executor.raise_deferred()


# ---- random numbers ----------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5))
        self.b = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
        self.c = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def masks(splits: list[str], method: str = "bp", seed: int = 5, steps: int = 2) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    model = Noisy()
    found: dict[str, list[Tensor]] = {}
    program = compiled(model, method, splits, seed=seed, optimizer=sgd(0.0))
    for name in ("a", "b", "c"):
        drop = model.get_submodule(name)[1]
        found[name] = []
        drop.register_forward_hook(lambda m, a, out, name=name: found[name].append((out == 0).detach()))
    for _ in range(steps):
        program.step(*batch())
    return found


def test_dropout_of_a_module_does_not_depend_on_how_the_later_ones_are_split():
    two, three = masks(["a"]), masks(["a", "b"])
    assert all(torch.equal(m, n) for m, n in zip(two["a"], three["a"], strict=True))
    assert torch.equal(two["a"][0], masks(["a"], "dgl")["a"][0])


def test_dropout_differs_between_modules_steps_and_seeds():
    found = masks(["a", "b"])
    assert not torch.equal(found["a"][0], found["b"][0])
    assert not torch.equal(found["a"][0], found["a"][1])
    assert not torch.equal(found["a"][0], masks(["a", "b"], seed=6)["a"][0])
    assert torch.equal(found["a"][0], masks(["a", "b"])["a"][0])


class Drawing(torch.optim.SGD):
    drawn: ClassVar[list[Tensor]]

    def step(self, closure: Any = None) -> Any:
        self.drawn.append(torch.rand(()))
        return super().step(closure)


@pytest.mark.parametrize(
    ("who", "stream"),
    [
        ("optimizer", "update of relu1"),
        ("hook of the optimizer", "update of relu1"),
        ("hook of a gradient", "backward of head_loss"),
        ("loss", "head_loss"),
    ],
)
def test_whatever_draws_starts_a_stream(who, stream):
    drawn: list[Tensor] = []

    def draw(*_: Any) -> None:
        drawn.append(torch.rand(()))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if who == "loss":
            draw()
        return functional.cross_entropy(output, target)

    Drawing.drawn = drawn
    optimizer = (lambda ps: Drawing(ps, lr=0.1)) if who == "optimizer" else sgd()
    program = compiled(mlp(), "dgl", ["relu1"], loss=loss, optimizer=optimizer, seed=5)
    if who == "hook of the optimizer":
        program.optimizers["relu1"].register_step_pre_hook(draw)
    if who == "hook of a gradient":
        program.model.first.weight.register_hook(draw)
    drawn.clear()
    program.step(*batch())
    expected = torch.Generator().manual_seed(streams.stream(5, 0, stream))
    assert drawn[0] == torch.rand((), generator=expected)


def test_the_users_random_state_is_left_alone():
    torch.manual_seed(123)
    state = torch.get_rng_state()
    program = compiled(Noisy(), "dgl", ["a", "b"], verify=True)
    # building the model draws; nothing after it may
    torch.set_rng_state(state)
    program.step(*batch())
    program.fit([batch()], epochs=2, progress=False)
    program.evaluate([batch()])
    assert torch.equal(state, torch.get_rng_state())
    model = Noisy()
    state = torch.get_rng_state()
    compiled(model, "dgl", ["a", "b"])
    with pytest.raises(locc.LoccError):
        compiled(model, "dgl", ["nowhere"])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.initial_seed() == 123


# ---- what goes wrong ---------------------------------------------------------------------------


def flaky(mode: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if "raise" in mode:
            raise mode["raise"]
        return functional.cross_entropy(output, target) * mode.get("factor", 1.0)

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_objective_names_module_and_objective_and_changes_nothing_there(value):
    mode: dict[str, Any] = {}
    program = compiled(mlp(), "dgl", ["relu1", "relu2"], loss=flaky(mode))
    program.step(*batch())
    before = snapshot(program.model)
    mode["factor"] = value
    with pytest.raises(
        RunError, match=rf"objective '\w+' of module 'relu1' is {value}; the step stopped before"
    ):
        program.step(*batch())
    assert same(before, snapshot(program.model))
    assert all(p.grad is None for p in program.parameters())
    assert program.steps == 1
    del mode["factor"]
    program.step(*batch())


class LastIsBroken(nn.Module):
    """The second module divides by zero when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) / scale


def broken(atomic: bool, **options: Any) -> tuple[Program, tuple[Any, Tensor], tuple[Any, Tensor]]:
    x, y = batch()
    good, bad = (x, torch.ones(5, 1)), (x, torch.zeros(5, 1))
    program = compiled(LastIsBroken(), "dgl", ["a"], example_inputs=good, atomic=atomic, **options)
    return program, (good, y), (bad, y)


@pytest.mark.parametrize("earlier", [0, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_atomic_undoes_the_whole_step_bit_for_bit(earlier, accumulate):
    """A run with the bad step equals one without: parameters, buffers, optimizers, accumulated gradients."""
    runs = []
    for failing in (False, True):
        torch.manual_seed(0)
        options = {
            "optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
            "accumulate": accumulate,
        }
        program, good, bad = broken(True, seed=0, **options)
        for _ in range(earlier):
            program.step(*good)
        if failing:
            with pytest.raises(RunError):
                program.step(*bad)
        states = [[dict(s) for s in o.state.values()] for o in program.optimizers.values()]
        for _ in range(3):
            program.step(*good)
        runs.append((states, snapshot(program.root)))
    assert str(runs[0][0]) == str(runs[1][0])
    assert same(runs[0][1], runs[1][1])


def test_a_loss_that_is_no_scalar():
    mode: dict[str, Any] = {}

    def loss(output: Tensor, target: Tensor) -> Any:
        found = functional.cross_entropy(output, target, reduction="none")
        return found if mode.get("rows") else found.mean() if not mode.get("number") else float(found.mean())

    program = compiled(mlp(), "bp", ["relu1"], loss=loss)
    for what, found in (("rows", r"shape \(5,\)"), ("number", "float")):
        mode[what] = True
        with pytest.raises(locc.LoccError, match=rf"loss 'loss' must return a 0-d tensor; found {found}"):
            program.step(*batch())
        mode.clear()


def test_a_first_step_without_example_inputs_completes_the_program():
    program = locc.compile(mlp(), "bp", ["first"])
    assert "not complete" in repr(program)
    with pytest.raises(RunError, match="pass example_inputs to compile, or run a step first"):
        program.ir  # noqa: B018
    with pytest.raises(locc.CaptureError):
        program.step(torch.zeros(5, 9), batch()[1])
    program.step(*batch())
    assert [o.name for o in program.ir.modules] == ["first", "output"]


# ---- sequential --------------------------------------------------------------------------------


def test_sequential_is_refused_where_a_module_needs_a_later_one():
    with pytest.raises(
        locc.MethodError, match=r"but method 'bp' needs 'output' to train 'first'; use schedule='lockstep'"
    ):
        compiled(mlp(), "bp", ["first"], schedule="sequential")


def test_without_example_inputs_only_a_few_samples_are_run_end_to_end():
    model, sizes = mlp(), []
    model.first.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    x, y = batch(64)
    program = locc.compile(model, "dgl", ["first"])
    program.step(x, y)
    assert max(sizes[:-1]) <= 8
    assert sizes[-1] == 64


def test_a_model_that_needs_its_full_batch_is_compiled_on_it():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x):
            if x.shape[0] != 12:
                raise ValueError("twelve, please")
            return self.b(self.a(x).repeat(1, 2))

    x, y = batch(12)
    report = locc.compile(Pairs(), "dgl", ["a"]).step(x, y)
    assert torch.isfinite(report.loss)
