"""`examine`: tells what compile would do, raises nothing for it, and leaves no trace on the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import locc


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def test_what_compile_would_do() -> None:
    found = locc.examine(model(), "dgl", ["1", "3"], example_inputs=torch.randn(4, 6))
    assert found.ok
    assert found.complete
    assert [m.name for m in found.modules if not m.auxiliary] == ["1", "3", "4"]
    assert [m.parameters for m in found.modules] == [56, 72, 27]
    assert found.modules[0].added > 0
    assert found.modules[2].objectives == ("4.loss",)
    assert [(c.producer, c.consumer, c.bytes_per_sample) for c in found.crossings] == [
        ("1", "3", 32),
        ("3", "4", 32),
    ]
    assert "def step(" in (found.ir or "")
    assert "update" in (found.plan or "")
    assert "compiles" in str(found)


@pytest.mark.parametrize(
    ("method", "splits", "options", "stage", "message"),
    [
        ("dglx", ["1"], {}, "options", "there is no method 'dglx'"),
        ("dgl", ["1"], {"widht": 3}, "options", "no option 'widht'"),
        ("dgl", ["9"], {}, "partition", "split '9' matches no submodule"),
        ("dgl", ["1"], {"loss": "msee"}, "options", "nearest: 'mse'"),
    ],
)
def test_why_it_cannot(
    method: str, splits: list[str], options: dict[str, object], stage: str, message: str
) -> None:
    found = locc.examine(model(), method, splits, example_inputs=torch.randn(4, 6), **options)
    assert not found.ok
    assert found.stage == stage
    assert message in (found.problem or "")
    assert message in str(found)


def test_without_inputs_only_the_options_are_examined() -> None:
    found = locc.examine(model(), "dgl", ["1"])
    assert found.ok
    assert not found.complete
    assert "example_inputs" in str(found)
    with pytest.raises(locc.LoccError, match=r"must be a torch\.nn\.Module"):
        locc.examine("model")  # type: ignore[arg-type]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_the_model_stays_as_it_was() -> None:
    network = Tied().eval()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    x = torch.randn(4, 4)
    random = torch.get_rng_state()
    found = locc.examine(network, "bp", ["a"], tied="copy", example_inputs=x)
    assert found.ok
    assert found.tied == (("a.weight", "b.weight"),)
    assert network.a.weight is network.b.weight
    assert not network.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert "tied=" in (
        locc.examine(network, "bp", ["a"], example_inputs=torch.randn(4, 4), tied="error").problem or ""
    )
