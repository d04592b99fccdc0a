"""What METHODS.md section H asks of every method, over every method that is registered.

A method is tested on the first models of `MODELS` that it admits, and must admit one; it may refuse the
others with a `MethodError`. Nothing here names a method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc import testing
from locc.ir import ops
from locc.ir.graph import node_parameters
from locc.lower import Backward, Update
from locc.runtime import Program

METHODS = locc.methods()
NAMES = sorted(METHODS)
PROXIES = [name for name in NAMES if METHODS[name].family == "proxy"]
BATCH, CLASSES = 12, 3


@dataclass(frozen=True)
class Model:
    """A tiny model for classification, and where to cut it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    splits: tuple[str, ...]


def chain(
    activation: type[nn.Module], *, norm: bool = False, dropout: bool = False
) -> Callable[[], nn.Module]:
    """Three blocks of a linear layer and an activation; the last one is linear."""

    def build() -> nn.Module:
        blocks = []
        for _ in range(2):
            layers: list[nn.Module] = [nn.Linear(8, 8)]
            layers += [nn.BatchNorm1d(8)] if norm else []
            layers += [activation()]
            layers += [nn.Dropout(0.2)] if dropout else []
            blocks.append(nn.Sequential(*layers))
        return nn.Sequential(*blocks, nn.Sequential(nn.Linear(8, CLASSES)))

    return build


def conv() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(first, second, nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)))


MODELS = {
    "mlp": Model(chain(nn.Tanh), (8,), ("0", "1")),
    "norm": Model(chain(nn.ReLU, norm=True, dropout=True), (8,), ("0", "1")),
    "conv": Model(conv, (1, 8, 8), ("0", "1")),
    "two": Model(chain(nn.Tanh), (8,), ("0",)),
    "elu": Model(chain(nn.ELU), (8,), ("0", "1")),
}


def data(model: Model, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, *model.shape, generator=draw), torch.arange(BATCH) % CLASSES


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.5)


def program_of(
    method: str, model: Model, *, splits: tuple[str, ...] | None = None, **options: Any
) -> Program:
    torch.manual_seed(0)
    options = {"optimizer": sgd, "seed": 0, "example_inputs": data(model)[0]} | options
    return locc.compile(model.build(), method, model.splits if splits is None else splits, **options)


@cache
def admitted(method: str) -> tuple[str, ...]:
    found = []
    for name, model in MODELS.items():
        try:
            program_of(method, model)
        except locc.MethodError:
            continue
        found.append(name)
    return tuple(found)


def models_of(method: str, count: int = 2) -> list[Model]:
    names = admitted(method)
    if not names:
        pytest.fail(f"'{method}' admits none of {list(MODELS)}")
    return [MODELS[n] for n in names[:count]]


def train(program: Program, model: Model, rounds: int = 1) -> None:
    """Run steps in every phase of the program, in the order in which `fit` would reach them."""
    phases = [phase.name for phase in program.phases] or [None]
    for number in range(rounds):
        for phase in phases:
            program.phase = phase
            program.step(*data(model, number))


def state(program: Program) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in program.root.state_dict().items()}


def test_some_methods_are_registered() -> None:
    assert len(NAMES) > 1
    assert len(PROXIES) > 1


@pytest.mark.parametrize("method", NAMES)
def test_admits_a_model_and_refuses_the_others_in_a_sentence(method: str) -> None:
    assert admitted(method)
    for name in set(MODELS) - set(admitted(method)):
        with pytest.raises(locc.MethodError, match=r"undefined on this model: .{20,}"):
            program_of(method, MODELS[name])


@pytest.mark.parametrize("method", PROXIES)
@pytest.mark.parametrize("name", ["norm", "conv"])
def test_one_module_is_bp(method: str, name: str) -> None:
    """H1: with K=1 a proxy method is `bp`, bit for bit, dropout and batch norm included."""
    model = MODELS[name]
    own, bp = program_of(method, model, splits=()), program_of("bp", model, splits=())
    before = state(bp)
    for seed in range(3):
        batch = data(model, seed)
        assert own.step(*batch).loss == bp.step(*batch).loss
    wanted = bp.model.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in own.model.state_dict().items())
    assert any(not torch.equal(v, before[f"model.{k}"]) for k, v in wanted.items())


@pytest.mark.parametrize("method", NAMES)
def test_no_objective_reaches_a_foreign_parameter(method: str) -> None:
    """H2: after the backward pass of an owner's objective, its parameters alone have a gradient."""
    for model in models_of(method):
        program = program_of(method, model)
        owner_of = {
            id(p): o for o in program.ir.owners for p in program.ir.parameters(o).values() if p.requires_grad
        }
        parameters = dict(program.root.named_parameters())
        running: dict[str, set[str]] = {}
        seen: set[str] = set()

        def observe(
            instruction: Any,
            _values: Any,
            owner_of: dict[int, str] = owner_of,
            parameters: dict[str, nn.Parameter] = parameters,
            running: dict[str, set[str]] = running,
            seen: set[str] = seen,
        ) -> None:
            held = {n for n, p in parameters.items() if p.grad is not None}
            if isinstance(instruction, Backward):
                before = running.setdefault("before", set())
                foreign = [n for n in held - before if owner_of[id(parameters[n])] != instruction.owner]
                assert not foreign, f"an objective of '{instruction.owner}' reaches {foreign}"
                if instruction.objectives:
                    seen.add(instruction.owner)
            elif isinstance(instruction, Update):
                left = [n for n in held if owner_of[id(parameters[n])] == instruction.owner]
                assert not left, f"gradients of '{instruction.owner}' outlive its update: {left}"
            running["before"] = held

        program.built.executor.observe = observe
        train(program, model)
        assert {o.name for o in program.ir.modules} <= seen | _assigned(program)


def _assigned(program: Program) -> set[str]:
    """Owners whose parameters are set in closed form."""
    return {str(n.meta["owner"]) for n in program.ir.graph.nodes if n.target is ops.assign}


@pytest.mark.parametrize("method", NAMES)
def test_each_module_trains_as_it_would_alone(method: str) -> None:
    """H2, for values: in every phase, and whatever becomes of the other modules' objectives."""
    for model in models_of(method):
        program = program_of(method, model)
        for phase in [p.name for p in program.phases] or [None]:
            program.phase = phase
            testing.assert_isolated(program, *data(model))
            program.step(*data(model, 1))
        testing.assert_local(program, *data(model))


@pytest.mark.parametrize("method", NAMES)
def test_a_pipeline_trains_the_same_network_where_the_certificate_says_so(method: str) -> None:
    """H8: pipelined = lock-step, bit for bit."""
    for model in models_of(method):
        program = program_of(method, model)
        batches = [data(model, seed) for seed in range(5)]
        if program.certificate.pipeline_exact:
            testing.assert_pipeline_exact(program, batches)
        else:
            with pytest.raises(AssertionError, match="is not pipeline-exact"):
                testing.assert_pipeline_exact(program, batches)


def test_some_methods_are_pipeline_exact_and_some_are_not() -> None:
    exact = {program_of(name, models_of(name, 1)[0]).certificate.pipeline_exact for name in NAMES}
    assert exact == {True, False}


@pytest.mark.parametrize("method", NAMES)
def test_every_trainable_parameter_moves(method: str) -> None:
    """No gradient is silently zero: some steps change every parameter, auxiliaries included."""
    for model in models_of(method):
        program = program_of(method, model, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
        before = {n: p.clone() for n, p in program.root.named_parameters()}
        train(program, model, rounds=3)
        stuck = [
            n for n, p in program.root.named_parameters() if p.requires_grad and torch.equal(p, before[n])
        ]
        assert not [n for n in stuck if not _before_a_norm(program, n)]


def _before_a_norm(program: Program, name: str) -> bool:
    """Whether a bias is cancelled by the batch norm after it: its gradient is zero in any method."""
    path, _, last = name.rpartition(".")
    parent, _, position = path.rpartition(".")
    home = program.root.get_submodule(parent)
    if last != "bias" or not isinstance(home, nn.Sequential) or int(position) + 1 >= len(home):
        return False
    return isinstance(home[int(position) + 1], nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("method", NAMES)
def test_inference_keeps_exactly_the_model(method: str) -> None:
    """H11: inference calls the model's own parts and nothing else; a folded network declares its own."""
    for model in models_of(method):
        program = program_of(method, model)
        train(program, model)
        ir = program.ir
        called = {str(n.target) for n in ir.inference.nodes if n.op in ("call_module", "get_attr")}
        auxiliary = {c for c in called if not c.startswith("model.")}
        program.eval()
        x, _ = data(model)
        if not ir.folded:
            assert not auxiliary
            assert torch.equal(program(x), program.model(x))
            bare = copy.deepcopy(program.model)
            assert not [m for m in program.model.modules() if m._forward_hooks or m._forward_pre_hooks]
            assert torch.equal(bare(x), program(x))
        assert program(x).shape == (BATCH, CLASSES)


@pytest.mark.parametrize("method", NAMES)
def test_inference_reads_no_label(method: str) -> None:
    """H13: the inference graph has the model's inputs alone, and the output does not change with y."""
    for model in models_of(method, 1):
        program = program_of(method, model)
        holders = [n.name for n in program.ir.inference.nodes if n.op == "placeholder"]
        assert len(holders) == len(program.ir.inputs)
        x, y = data(model)
        train(program, model)
        program.eval()
        before = program(x)
        first, second = program.evaluate([(x, y)]), program.evaluate([(x, (y + 1) % CLASSES)])
        assert torch.equal(program(x), before)
        assert first.loss != second.loss  # the label is read by the loss, after the prediction


@pytest.mark.parametrize("method", NAMES)
def test_matrices_that_are_fixed_stay_so(method: str, tmp_path: Path) -> None:
    """H12: a floating-point buffer of an auxiliary that nothing assigns is constant, and is saved."""
    for model in models_of(method):
        program = program_of(method, model)
        statistics = {
            f"{path}.{name}"
            for path, m in program.root.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
            for name, _ in m.named_buffers(recurse=False)
        }
        assigned = {str(n.args[0].target) for n in program.ir.graph.nodes if n.target is ops.assign}  # type: ignore[union-attr]
        fixed = {n: b.clone() for n, b in program.root.named_buffers() if n not in statistics | assigned}
        train(program, model, rounds=3)
        after = dict(program.root.named_buffers())
        assert all(torch.equal(b, after[n]) for n, b in fixed.items())
        held = {id(p) for o in program.optimizers.values() for g in o.param_groups for p in g["params"]}
        assert not [n for n in fixed if id(after[n]) in held]
        program.save(tmp_path / "state")
        with torch.no_grad():
            for n in fixed:
                after[n].add_(1)
        program.load(tmp_path / "state")
        assert all(torch.equal(b, dict(program.root.named_buffers())[n]) for n, b in fixed.items())


@pytest.mark.parametrize("method", NAMES)
def test_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    for model in models_of(method):
        program = program_of(method, model)
        train(program, model, rounds=2)
        program.save(tmp_path / "state")
        train(program, model, rounds=2)
        other = program_of(method, model, seed=99)
        other.load(tmp_path / "state")
        train(other, model, rounds=2)
        wanted = state(program)
        differing = [n for n, v in state(other).items() if not torch.equal(v, wanted[n])]
        assert not differing


@pytest.mark.parametrize("method", NAMES)
def test_every_parameter_of_the_graph_has_one_optimizer(method: str) -> None:
    for model in models_of(method, 1):
        program = program_of(method, model)
        held = [id(p) for o in program.optimizers.values() for g in o.param_groups for p in g["params"]]
        assert len(held) == len(set(held))
        used = {id(p) for n in program.ir.graph.nodes for _, p in node_parameters(program.ir.root, n)}
        assert set(held) <= used
