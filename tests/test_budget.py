"""`splits=locc.fit(...)`: the fewest modules that keep to a budget, and a step that does keep to it."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from benchmarks import meter
from locc import LoccError, Program, SplitError
from support import everything, same

WIDTHS = (40, 24, 48, 16)
BATCH = 96
X, Y = torch.randn(BATCH, 32, generator=torch.Generator().manual_seed(3)), torch.arange(BATCH) % 7


class Block(nn.Module):
    """One place for a cut."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, inner), nn.Linear(inner, 32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.elu(self.two(nn.functional.elu(self.one(x))))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*map(Block, WIDTHS), nn.Linear(32, 7))


def program(splits: Any, method: str = "dgl", model: nn.Module | None = None, **options: Any) -> Program:
    options = {"optimizer": lambda ps: torch.optim.Adam(ps, lr=0.01), "seed": 1, "verify": False} | options
    return locc.compile(
        network() if model is None else model, method, splits, example_inputs=X[:4], **options
    )


def taken(made: Program) -> tuple[int, int]:
    """What is kept from step to step, and what a step takes, by a meter that knows nothing of locc."""
    for _ in range(2):
        made.step(X, Y)
    peak = meter.peak(lambda: made.step(X, Y), made.root.parameters()).total
    states = [t for o in made.optimizers.values() for s in o.state.values() for t in s.values()]
    return sum(t.nbytes for t in [*made.root.parameters(), *made.root.buffers(), *states]), peak


def test_there_are_no_fewer_modules_and_a_step_keeps_to_the_budget() -> None:
    places = [str(i) for i in range(len(WIDTHS))]
    every = (c for k in range(len(places) + 1) for c in itertools.combinations(places, k))
    measured = {cuts: taken(program(list(cuts))) for cuts in every}
    found = {cuts: kept + math.ceil(1.02 * step) for cuts, (kept, step) in measured.items()}
    budgets = {min(t for c, t in found.items() if len(c) == k) for k in range(len(places) + 1)}
    counts = set()
    for budget in budgets:
        made = program(locc.fit(budget, BATCH))
        fewest = min(len(cuts) for cuts, total in found.items() if total <= budget) + 1
        assert len(made.ir.modules) == fewest
        assert sum(taken(made)) <= budget
        counts.add(fewest)
    assert len(counts) > 2


def test_cuts_that_were_searched_train_as_named_ones() -> None:
    made = program(locc.fit("260KB", BATCH))
    named = program([module.name for module in made.ir.modules[:-1]])
    for one in (made, named):
        one.step(X, Y)
    assert len(made.ir.modules) > 1
    assert same(everything(made), everything(named))


def least(**options: Any) -> list[int]:
    """The numbers of a refusal: the total, and what is for parameters, state and the step."""
    torch.manual_seed(0)
    with pytest.raises(SplitError) as refused:
        program(locc.fit(1000, BATCH), model=nn.Sequential(Block(48), Block(48)), **options)
    found = re.search(
        r"with 2 modules.* '0' takes (\d+) .*: (\d+) for.* (\d+) for.* (\d+) for", str(refused.value)
    )
    assert found is not None, refused.value
    return [int(number) for number in found.groups()]


def test_it_counts_what_a_setting_keeps_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    total, parameters, state, step = least()
    assert total == parameters + state + step
    assert least(accumulate=2) == [total + parameters, parameters, state, step + parameters]  # gradients
    assert least(atomic=True) == [total + parameters + state, 2 * parameters, 2 * state, step]
    total, one, of_one, alike = least(offload="disk")
    head = nn.Linear(32, 32)
    assert one == sum(p.nbytes for m in (Block(48), head) for p in m.parameters()) < parameters
    assert of_one == pytest.approx(2 * one, rel=0.01)  # Adam's counters beside its two states
    assert (total, alike) == (one + of_one + step, step)
    monkeypatch.setattr("locc.compiler.device_for", lambda model: torch.device("cpu"))
    assert least(offload="cpu")[1] == parameters  # there are two modules, and the next one is on the device


class _NeedsData(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ({}, {"method": "bp"}, r"no cut keeps to that; the whole model takes \d+ bytes, \d+ too many"),
        ({}, {}, r"with \d modules, the least, '2' takes \d+ bytes, \d+ too many: \d+ for parameters"),
        ({}, {"schedule": "wave"}, "schedule='wave' keeps several between its modules"),
        (
            {},
            {"model": nn.Sequential(_NeedsData(8), nn.Linear(32, 7))},
            "a step does not run on shapes alone",
        ),
        ({"memory": "much"}, {}, "memory='much': give a number of bytes"),
        ({"batch": 0}, {}, r"locc.fit\(batch=0\): give the number of samples"),
    ],
    ids=["no cut helps", "too large", "wave", "needs data", "memory", "batch"],
)
def test_refusals(given: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(LoccError, match=says):
        program(locc.fit(**{"memory": 1000, "batch": BATCH} | given), **options)
