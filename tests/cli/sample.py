"""What the tests of the command line name: models and data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


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
