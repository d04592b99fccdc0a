from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from locc import SplitError
from support import compiled, gap


class Changing(nn.Module):
    """Four layers; a subclass says who changes what in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.d, self.e = nn.Linear(6, 3), nn.Linear(6, 6)
        self.soft = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))


class ConsumerChanges(Changing):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.mul_(2.0)
        return self.d(torch.tanh(self.b(h)) + h)


class LeafChanges(Changing):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        z = self.soft(h)
        return self.d(z + h)


class ChangedSum(Changing):
    """The sum is changed in place, not its terms: whoever reads a term later may go on doing so."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        z = functional.relu_(h + self.b(h))
        return self.d(torch.tanh(self.c(z))) + self.d(h)


class ViewOfOwnCopy(Changing):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        rows = h.view(-1, 2, 3)
        rows.mul_(2.0)
        return self.d(torch.tanh(self.b(h)) + h)


class ReadInChangedForm(Changing):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        z = self.b(h.mul_(2.0))
        return self.d(torch.tanh(self.c(z)) + h)


class OtherAlias(Changing):
    """`rows` shares storage with `h`: both come from the first module, and the second changes `h`."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        rows = h.view(-1, 2, 3)
        z = self.c(self.b(torch.tanh(rows.flatten(1))))
        h.mul_(2.0)
        return self.d(torch.tanh(z + h) + rows.flatten(1))


@pytest.mark.parametrize(
    ("kind", "splits"),
    [
        (ConsumerChanges, ["a"]),
        (ConsumerChanges, ["a", "b"]),
        (LeafChanges, ["a"]),
        (LeafChanges, ["a", "soft"]),
        (ChangedSum, ["a"]),
        (ChangedSum, ["a", "b"]),
        (ViewOfOwnCopy, ["a"]),
        (ViewOfOwnCopy, ["a", "b"]),
        (ReadInChangedForm, ["a", "b", "c"]),
        (OtherAlias, ["c"]),
    ],
)
def test_gradients_of_the_producer_survive_a_consumer_that_changes_its_input(kind, splits):
    assert gap(kind(), splits) < 1e-12


def test_the_consumer_changes_a_copy_and_only_where_it_changes_something():
    ir = compiled(ConsumerChanges(), "bp", ["a"]).ir
    (copied,) = ir.nodes(role="copy")
    assert copied.meta["owner"] == "output"
    assert not compiled(ChangedSum(), "bp", ["a"], tied="owner").ir.nodes(role="copy")


def test_a_value_changed_in_place_that_a_third_module_reads_is_refused():
    class Third(Changing):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            rows = h.view(-1, 2, 3)
            z = self.soft[1](self.b(torch.tanh(h)))
            h.mul_(2.0)
            return self.d(self.e(self.c(torch.tanh(z) + h)) + rows.flatten(1))

    with pytest.raises(
        SplitError, match=r"changes 'view' in place and module 'output' reads it afterwards; use an out"
    ):
        compiled(Third(), "bp", ["b", "c"])


def test_a_second_name_of_a_changed_storage_is_refused():
    with pytest.raises(
        SplitError, match=r"module 'output' changes 'view' in place through another value.*out-of-place"
    ):
        compiled(OtherAlias(), "bp", ["b"])


def test_an_alias_that_nobody_reads_does_not_cross():
    class Unread(Changing):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            z = self.c(self.b(torch.tanh(h.view(-1, 2, 3).flatten(1))))
            h.mul_(2.0)
            return self.d(torch.tanh(z) + h)

    ir = compiled(Unread(), "bp", ["b"]).ir
    assert sorted(b.value.name for b in ir.boundaries("b", "output")) == ["a", "b"]
    assert gap(Unread(), ["b"]) < 1e-12
