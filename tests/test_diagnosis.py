"""`program.diagnose`: its figures against ones computed by hand, and that it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import locc
from locc.diagnosis import _effective_rank
from support import batch, compiled, everything, sgd

SPLITS = ["0", "1", "2"]


def chain(activation: type[nn.Module] = nn.Tanh, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [
        nn.Sequential(
            nn.Linear(a, 6), *([nn.BatchNorm1d(6)] if norm else []), activation(), nn.Dropout(dropout)
        )
        for a in (4, 6, 6)
    ]
    return nn.Sequential(*parts, nn.Linear(6, 3)).double()


def loader(size: int = 8, count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(size, 4).double(), torch.randint(3, (size,))) for _ in range(count)]


def by_hand(model: nn.Module, program: locc.Program, x, y) -> dict[str, tuple[float, float]]:
    """The angle, and the length of the update in units of the weights, of a step of SGD at rate 1."""
    parts = {name: list(part.parameters()) for name, part in model.named_children()}
    loss = torch.nn.functional.cross_entropy(model(x), y)
    true = {name: torch.cat([g.flatten() for g in torch.autograd.grad(loss, ps, retain_graph=True)])
            for name, ps in parts.items()}  # fmt: skip
    before = {name: torch.cat([p.detach().flatten() for p in ps]) for name, ps in parts.items()}
    program.step(x, y)
    found = {}
    for name, parameters in parts.items():
        moved = before[name] - torch.cat([p.detach().flatten() for p in parameters])
        cosine = float(moved @ true[name] / (moved.norm() * true[name].norm()))
        found[name] = math.degrees(math.acos(min(1.0, cosine))), float(moved.norm() / before[name].norm())
    return found


@pytest.mark.parametrize("method", ["bp", "dfa", "dgl"])
def test_angles_and_updates_are_those_computed_by_hand(method):
    data = loader(count=1)
    model = chain()
    program = compiled(model, method, SPLITS, optimizer=sgd(1.0), example_inputs=data[0][0])
    seen = {h.owner: h for h in program.diagnose(data).owners}
    for name, (angle, moved) in by_hand(model, program, *data[0]).items():
        assert seen[name].angle == pytest.approx(angle, abs=1e-4)
        if method != "dgl" or name == "3":  # its modules have a head as well
            assert seen[name].moved == pytest.approx(moved, rel=1e-9)
        assert (angle < 1e-4) == (method == "bp" or name == "3")


class Drifting(nn.Module):
    """Computes something else in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x):
        self.shift += 0.5
        return torch.tanh(x + self.shift)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_backpropagation_has_no_angle(options):
    data = loader(count=4)
    model = chain()
    model[1][1] = Drifting()
    found = compiled(model, "bp", SPLITS, example_inputs=data[0][0], **options).diagnose(data)
    assert max(h.angle for h in found.owners) < 1e-4
    assert not found.verdicts


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bp", {"accumulate": 2}),
        ("dgl", {"schedule": "sequential"}),
        ("dtp", {}),
        ("cdni", {"width": 8, "clip": 0.1}),
        ("altmin", {"mu_step": 0.001}),
        ("al", {}),
    ],
)
def test_a_diagnosis_leaves_no_trace(method, options):
    data = loader()
    program = compiled(chain(dropout=0.5, norm=True), method, SPLITS, example_inputs=data[0][0], **options)
    program.fit(data, 1, progress=False)
    program.step(*data[0])  # half of an accumulation
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    generator = torch.Generator().manual_seed(3)
    shuffled = DataLoader(TensorDataset(x, y), 5, shuffle=True, generator=generator)
    program.eval()
    before, drawn, steps = everything(program), generator.get_state(), program.steps
    found = program.diagnose(shuffled, steps=4)
    after = everything(program)
    assert found.steps == 4
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert before.keys() == after.keys()
    assert torch.equal(generator.get_state(), drawn)
    assert (program.steps, program.training) == (steps, False)
    assert all(not o._optimizer_step_pre_hooks for o in program.optimizers.values())
    modules = [h for h in found.owners if h.angle is not None]
    assert len(modules) == (1 if options.get("schedule") else len(program.ir.modules))


class Turn(nn.Module):
    """x W with a fixed matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix)

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(("scale", "error"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.25)])
def test_the_error_of_an_inverse(scale, error):
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    model = nn.Sequential(nn.Linear(4, 6).double(), Turn(turn.clone()), nn.Linear(6, 3).double())
    x = torch.randn(2000, 4).double()
    x -= x.mean(0)
    nn.init.zeros_(model[0].bias)
    program = compiled(model, "dtp", ["0", "1"], example_inputs=x, factory=lambda *_: Turn(turn.t() * scale))
    found = program.diagnose([(x, torch.randint(3, (2000,)))])
    (inverse,) = (h for h in found.owners if h.owner == "1.inverse")
    assert inverse.error == pytest.approx(error, abs=0.01)
    told = [v for v in found.verdicts if "its inverse reconstructs nothing" in v]
    assert len(told) == (error > 0.9)
    assert all("module '1'" in v and "lower sigma" in v for v in told)


def test_a_synthesiser_that_predicts_nothing_is_told():
    data = loader(64, 2)
    program = compiled(chain(), "dni", SPLITS, example_inputs=data[0][0], width=8)
    found = program.diagnose(data, 1)  # it predicts zero, and has learned nothing yet
    assert any("module '2': its synthesiser predicts nothing of the gradient" in v for v in found.verdicts)
    assert "module '0': its weights do not move: what reaches its optimizer is zero" in found.verdicts


def test_dead_units_and_rank():
    model = chain(nn.ReLU)
    with torch.no_grad():
        model[1][0].bias[:4] = -100.0
    data = loader(50, 2)
    found = compiled(model, "bp", SPLITS, example_inputs=data[0][0]).diagnose(data)
    health = next(h for h in found.owners if h.owner == "1")
    assert health.units == 6
    sent = torch.cat([model[:2](x) for x, _ in data])
    dead = float((sent == sent[0]).all(0).double().mean())
    assert health.dead == dead >= 4 / 6
    assert any(v.startswith(f"module '1': {dead:.0%} of the 6 units") for v in found.verdicts)
    assert 1.0 <= health.rank <= 2.0 + 1e-9


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_effective_rank_of_equal_directions_is_their_number(rank):
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.cat([torch.ones(40, 1), torch.randn(40, rank)], 1).double()).Q[:, 1:]
    assert _effective_rank(5 + rows @ torch.linalg.qr(torch.randn(6, 6).double()).Q[:rank]) == pytest.approx(
        rank, abs=1e-6
    )


def test_images_have_channels_for_units():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 5, 3), nn.Tanh()), nn.Flatten(), nn.Linear(180, 3))
    x = torch.randn(4, 1, 8, 8)
    found = compiled(model, "bp", ["0"], example_inputs=x).diagnose([(x, torch.randint(3, (4,)))])
    assert found.owners[0].units == 5


@pytest.mark.parametrize(
    ("data", "steps", "message"), [([], 1, "yielded no batch"), (loader(), 0, "steps=0: give a number")]
)
def test_what_cannot_be_diagnosed(data, steps, message):
    with pytest.raises(locc.LoccError, match=message):
        compiled(chain(), "bp", SPLITS, example_inputs=loader()[0][0]).diagnose(data, steps)


def test_it_prints_as_a_table():
    x, y = batch()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    text = str(locc.compile(model, "bp", ["1"]).diagnose([(x, y)]))
    lines = text.splitlines()
    assert lines[0] == "diagnosis after 1 steps"
    assert lines[1].split() == ["angle", "update/weight", "error", "rank", "dead"]
    assert lines[2].split()[:2] == ["1", "0.0"]
    assert lines[-1] == "nothing is amiss"


@pytest.mark.parametrize(("method", "blamed"), [("dfa", True), ("al", False)])
def test_only_who_is_to_follow_the_gradient_is_blamed_for_its_angle(method, blamed):
    data = loader(64, 2)
    found = compiled(chain(), method, SPLITS, example_inputs=data[0][0], seed=1).diagnose(data)
    assert any(h.angle is not None and h.angle > 80 for h in found.owners)
    assert any("true gradient" in v for v in found.verdicts) == blamed
