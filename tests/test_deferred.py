"""Models that need not fit in memory: `locc.deferred()`, the meta device, and shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import locc
from locc import LoccError, Program
from support import everything, same, snapshot

X, Y = torch.randn(6, 5, 40, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


class Model(nn.Module):
    """Has ties, a recurrent layer, state, and what shares memory with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(40, 40)
        self.loop = nn.LSTM(40, 40, batch_first=True)
        self.norm = nn.BatchNorm1d(40)
        self.again = nn.Linear(40, 40)
        self.again.weight = self.inp.weight
        self.out = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.loop(torch.tanh(self.inp(x)))
        return self.out(torch.tanh(self.again(self.norm(h[:, -1]))))


def built(within: Any = None, make: Callable[[], nn.Module] = Model) -> nn.Module:
    torch.manual_seed(0)
    with nullcontext() if within is None else within:
        return make()


def trained(model: nn.Module, **options: Any) -> Program:
    options = {"example_inputs": X, "seed": 0, "tied": "owner", "verify": False} | options
    made = locc.compile(model, "dgl", ["inp", "norm"], **options)
    for _ in range(2):
        made.step(X, Y)
    return made


def in_files(model: nn.Module) -> set[str]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name for name, t in tensors if t.untyped_storage().filename is not None}


LARGE = {"inp.weight", "loop.weight_ih_l0", "loop.weight_hh_l0"}
"""What takes a page or more."""
META = torch.device("meta")


def test_a_deferred_model_is_the_one_that_is_built_without(tmp_path: Path) -> None:
    plain, model = built(), built(locc.deferred(tmp_path))
    assert in_files(model) == LARGE
    assert same(snapshot(plain), snapshot(model))
    assert same(everything(trained(plain)), everything(trained(model, offload=tmp_path)))
    assert list(tmp_path.iterdir()) == []
    assert not in_files(built())  # outside it is over


def test_a_parameter_that_shares_its_memory_goes_on_to() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows = torch.zeros(40, 40)
            self.one, self.two = nn.Parameter(rows), nn.Parameter(torch.zeros(40, 40))
            self.register_buffer("seen", self.two.detach()[:1])
            rows.fill_(3.0)

    model = built(locc.deferred(), Sharing)
    assert in_files(model) == {"two", "seen"}
    model.two.detach().fill_(5.0)
    assert (model.one.unique().tolist(), model.seen.unique().tolist()) == ([3.0], [5.0])


@pytest.mark.parametrize("offload", [None, "disk"])
def test_a_model_on_the_meta_device_is_initialised_as_where_it_is_built(offload: str | None) -> None:
    model = built(META)
    assert locc.examine(model, "dgl", ["inp", "norm"], example_inputs=X, tied="owner").ok
    assert all(t.is_meta for t in model.state_dict().values())
    made, plain = trained(model, offload=offload), trained(built())
    assert same(everything(plain), everything(made))
    assert model.again.weight is model.inp.weight
    assert in_files(model) == (LARGE if offload else set())


def test_a_model_on_the_meta_device_takes_its_values_from_shards(tmp_path: Path) -> None:
    given = {name: torch.randn_like(t) for name, t in Model().state_dict().items() if t.is_floating_point()}
    given["norm.running_var"].abs_()
    del given["again.weight"], given["out.weight"], given["out.bias"]
    names = sorted(given)
    for i, part in enumerate((names[:4], names[4:])):
        save_file({name: given[name] for name in part}, tmp_path / f"part-{i}.safetensors")
    made = locc.compile(
        built(META), "dgl", ["inp"], weights=tmp_path, example_inputs=X, tied="owner", offload="disk"
    )
    found = made.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert 0 < float(found["out.weight"].abs().max()) <= 40**-0.5  # drawn


def file(folder: Path, **tensors: Tensor) -> Path:
    save_file(tensors, folder / "some.safetensors")
    return folder / "some.safetensors"


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(40, 3)
        self.register_buffer("angles", torch.arange(40.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, 0] * self.angles)


@pytest.mark.parametrize(
    ("tensors", "make", "says"),
    [
        (None, Rotary, r"'angles' is on the meta device, and a Rotary has no reset_parameters\(\)"),
        ({"inner.wait": torch.ones(1)}, Rotary, "holds 'inner.wait', which the model does not have; nearest"),
        (
            {"inner.weight": torch.ones(1), "angles": torch.ones(40)},
            Rotary,
            r"holds 'inner.weight' of shape \[1\], which in the model is \[3, 40\]",
        ),
    ],
    ids=["no reset", "name", "shape"],
)
def test_a_model_that_cannot_be_filled_stays_on_the_meta_device(
    tensors: Any, make: Callable[[], nn.Module], says: str, tmp_path: Path
) -> None:
    model = built(META, make)
    before = dict(model.named_parameters())
    weights = None if tensors is None else file(tmp_path, **tensors)
    with pytest.raises(LoccError, match=says):
        locc.compile(model, example_inputs=X, weights=weights)
    assert all(t.is_meta for t in model.state_dict().values())
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("some.safetensors", "fills a model on the meta device, and this one has its values"),
        (".", "is a folder without .safetensors files"),
        ("missing", "cannot be read: .*No such file"),
    ],
)
def test_weights_that_fill_nothing_are_refused(weights: str, says: str, tmp_path: Path) -> None:
    if weights.startswith("some"):
        file(tmp_path, angles=torch.ones(40))
    with pytest.raises(LoccError, match=says):
        locc.compile(Rotary(), example_inputs=X, weights=tmp_path / weights)


class Counting(nn.Module):
    """Replaces a buffer where tracing looks into it, on tensors that are only shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(40, 40), nn.Linear(40, 3)
        self.register_buffer("seen", torch.zeros(40, 40))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 100:
            raise ValueError
        self.seen = self.seen + x.detach().mean()
        return self.out(self.inner(x[:, 0]) @ self.seen)


def test_what_is_only_a_shape_is_in_no_file() -> None:
    made, plain = (
        locc.compile(built(make=Counting), "dgl", ["inner"], example_inputs=X, seed=0, offload=place)
        for place in ("disk", None)
    )
    for program in (made, plain):
        program.step(X, Y)
    assert plain.ir.captured.origin != "fx"
    assert same(everything(plain), everything(made))


def test_a_model_that_cannot_be_compiled_is_back_in_memory() -> None:
    model = built()
    before = snapshot(model)
    with pytest.raises(LoccError, match="not pipeline-exact"):
        locc.compile(model, "bp", ["inp"], example_inputs=X, tied="owner", offload="disk", schedule="wave")
    assert same(before, snapshot(model))
    assert not in_files(model)
    with pytest.raises(LoccError, match="place='/nowhere' is neither"), locc.deferred("/nowhere"):
        pass
