"""The memory estimate, against a meter that counts the storages of a real step and knows nothing of locc."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import locc
from benchmarks import meter
from support import every_method

from .shapes import SHAPES

METHODS = every_method()
SCALARS = 256
"""Bytes of 0-d results (objectives, the loss) that a real step keeps for its report."""


def _blocks(count: int, width: int, outputs: int) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ELU()) for _ in range(count)]
    return nn.Sequential(*blocks, nn.Linear(width, outputs))


def _measured(program: locc.Program, x: Any, y: Any) -> int:
    for _ in range(2):
        program.step(x, y)
    return meter.peak(lambda: program.step(x, y), program.root.parameters()).total


def _compile(method: str, shape: str, **options: Any) -> locc.Program:
    case = SHAPES[shape]
    torch.manual_seed(0)
    try:
        return locc.compile(case.build(), method, list(case.splits), example_inputs=case.x(), **options)
    except locc.MethodError as refusal:
        pytest.skip(f"{method} is not defined on this model: {refusal}")


@pytest.mark.parametrize("shape", ["residual", "convolutional"])
@pytest.mark.parametrize("method", METHODS)
def test_the_peak_is_that_of_a_real_step(method: str, shape: str) -> None:
    """In lockstep; not on recurrent layers: their CPU kernels keep a workspace that shapes do not tell."""
    program = _compile(method, shape, schedule="lockstep")
    memory = program.certificate.memory
    assert program.certificate.complete
    assert memory is not None
    measured = _measured(program, SHAPES[shape].x(), SHAPES[shape].y())
    assert memory.peak == pytest.approx(measured, rel=0.02, abs=SCALARS)


def test_it_is_exact_up_to_scalars_where_activations_are_large_and_grows_with_the_batch() -> None:
    peaks = []
    for batch in (64, 128):
        torch.manual_seed(0)
        model = _blocks(6, 64, 10)
        x, y = torch.randn(batch, 64), torch.randint(10, (batch,))
        program = locc.compile(model, "dgl", [str(i) for i in range(6)], example_inputs=x)
        memory = program.certificate.memory
        assert memory is not None
        assert memory.batch == batch
        assert abs(memory.peak - _measured(program, x, y)) < SCALARS
        peaks.append(memory.peak)
    assert 1.5 < peaks[1] / peaks[0] < 2.0


def test_local_learning_needs_less_than_one_module() -> None:
    """What the estimate is for: it tells the memory that cutting a model saves."""

    def peak(method: str, splits: list[str]) -> int:
        torch.manual_seed(0)
        model = _blocks(8, 32, 4)
        memory = locc.compile(model, method, splits, example_inputs=torch.randn(512, 32)).certificate.memory
        assert memory is not None
        return memory.peak

    assert peak("dgl", [str(i) for i in range(8)]) < 0.4 * peak("bp", [])


def test_parameters_and_optimizer_state_are_counted_apart() -> None:
    for method in ("dgl", "dtp"):
        program = _compile(method, "chain")
        memory = program.certificate.memory
        assert memory is not None
        held = [*program.root.parameters(), *program.root.buffers()]
        assert memory.parameters == sum(t.nbytes for t in held)
        for phase in [p.name for p in program.phases] or [None]:
            program.phase = phase
            program.step(SHAPES["chain"].x(), SHAPES["chain"].y())
        states = [t for o in program.optimizers.values() for s in o.state.values() for t in s.values()]
        assert memory.optimizer == sum(t.nbytes for t in states)


def test_every_owner_has_its_share_and_the_page_shows_it() -> None:
    certificate = _compile("dni", "chain").certificate
    memory = certificate.memory
    assert memory is not None
    assert memory.peak == max(size for _, size in memory.owners) == memory.of(memory.at)
    assert all(o.peak_memory == memory.of(o.name) for o in certificate.owners)
    assert all(o.peak_memory for o in certificate.owners)
    page = certificate.text(verbose=True)
    assert f"at a batch of {memory.batch}, in '{memory.at}'" in page
    assert page.count("at most while its code runs") == len(certificate.owners)
    assert memory.of("nobody") is None


class _NeedsData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


def test_a_model_that_needs_data_has_no_estimate_and_the_certificate_says_so() -> None:
    model = nn.Sequential(_NeedsData(), nn.Linear(6, 3))
    certificate = locc.compile(model, "bp", ["0"], example_inputs=torch.randn(4, 6)).certificate
    assert certificate.complete
    assert certificate.memory is None
    assert any("peak memory could not be estimated" in w for w in certificate.warnings)
    assert "memory estimate           none" in certificate.text(verbose=True)
    assert locc.Certificate.from_json(certificate.to_json()) == certificate
