"""What `locc.rewrite.crossing` finds among the values that modules send."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from locc.rewrite import activations, squared_distance
from support import compiled, sgd


class Biased(nn.Module):
    """The second module computes a table from a parameter alone, which the third adds as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.table = nn.Parameter(torch.randn(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.tanh(self.table)
        x = torch.tanh(self.first(x) + bias)
        x = torch.tanh(self.second(x) + bias)
        return self.third(x) + bias[:, :3]


def test_a_value_without_rows_is_no_activation_and_gets_its_readers_gradients() -> None:
    model = Biased().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    twin = copy.deepcopy(model)
    program = compiled(model, "dni", ["first", "second"], example_inputs=x, optimizer=sgd(1.0), width=16)
    assert [v.name for v in activations(program.ir, "first")] == ["first"]
    assert len(program.ir.crossing("second")) == 2
    # Synthetic gradients start at zero, so in the first step the loss alone reaches the table.
    table = torch.tanh(twin.table)
    second = twin.second(torch.tanh(twin.first(x) + table)).detach()
    nn.functional.cross_entropy(twin.third(torch.tanh(second + table)) + table[:, :3], y).backward()
    program.step(x, y)
    assert twin.table.grad is not None
    assert torch.allclose(twin.table - model.table, twin.table.grad, rtol=0, atol=1e-12)


def test_squared_distance_is_a_sum_over_units_and_a_mean_over_rows() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    for dim in (0, 1):
        wanted = ((a - b) ** 2).transpose(0, dim).flatten(1).sum(1).mean()
        assert torch.allclose(squared_distance(a, b, dim), wanted)


class Tables(nn.Module):
    """The first module computes a table with rows and without a gradient, as rotary embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.table = Cosines()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        table = self.table(h)
        return self.third(torch.tanh(self.second(torch.tanh(h) * table)) * table)


class Cosines(nn.Module):
    @torch.no_grad()
    def forward(self, h: Tensor) -> Tensor:
        return torch.cos(h)


@pytest.mark.parametrize("method", ["dgl", "predsim", "dtp", "dni", "cdni", "fa", "dfa", "altmin"])
def test_a_value_that_carries_no_gradient_gets_no_head_and_no_target(method: str) -> None:
    program = compiled(Tables(), method, ["table", "second"], example_inputs=torch.randn(6, 4))
    crossing = {b.value.name for b in program.ir.boundaries(producer="table")}
    assert crossing == {"first", "table"}
    assert [v.name for v in activations(program.ir, "table")] == ["first"]
    of_table = {name for name in program.root.aux if name.endswith("_table")}
    assert of_table <= {"feedback_table"}  # that of dfa goes by the module, which the value is named after
    program.step(torch.randn(6, 4), torch.randint(3, (6,)))
    assert not program.certificate.warnings


def test_a_head_reads_values_with_rows() -> None:
    program = compiled(Biased(), "dgl", ["first", "second"], example_inputs=torch.randn(6, 4))
    assert list(program.root.aux) == ["first_head_first", "second_head_second"]
