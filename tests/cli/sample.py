"""What the tests of the command line name: models and data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def steps() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.relu(self.left(a) + self.right(b)))


instance = mlp()
number = 3


def broken() -> nn.Module:
    raise KeyError("no such weights")


def loader() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(40, 64)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8)


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    return loader(), loader()


class _Interrupting(DataLoader[tuple[Tensor, ...]]):
    def __iter__(self):  # type: ignore[no-untyped-def]
        for number, batch in enumerate(super().__iter__()):
            if number == 3:
                raise KeyboardInterrupt
            yield batch


def interrupting() -> DataLoader[tuple[Tensor, ...]]:
    return _Interrupting(loader().dataset, 8)


def with_inputs() -> tuple[nn.Module, torch.Tensor]:
    """A model and its example inputs."""
    return mlp(), torch.randn(4, 64)


class Carrying(nn.Sequential):
    """A model that holds its example inputs, as Lightning's do."""

    def __init__(self) -> None:
        super().__init__(*mlp())
        self.example_input_array = torch.randn(4, 64)


class Leaky(nn.Module):
    """`b` adds what `a` computes, live and behind the graph's back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 8), Adding(), nn.Linear(8, 3)
        self.b.other = (self.a,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


class Adding(nn.Linear):
    """Adds the mean of another module's weight."""

    other: tuple[nn.Linear, ...] = ()

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + sum(o.weight.mean() for o in self.other)


def leaky() -> nn.Module:
    """A model with a leak."""
    return Leaky()
