"""scikit-learn's handwritten digits as tensors: 1797 images of 8x8 pixels that ship with the package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SPLIT_SEED = 2024
VALIDATION = 360


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] in [0, 1] and labels [N], for training and for validation."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor


def digits() -> Digits:
    """Return the data set in a split that is always the same."""
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16.0
    y = torch.tensor(raw.target, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    x, y = x[order], y[order]
    return Digits(x[VALIDATION:], y[VALIDATION:], x[:VALIDATION], y[:VALIDATION])


def loaders(
    batch_size: int = 64, seed: int = 0
) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return a training loader, whose shuffling depends on `seed` alone, and a validation loader."""
    data = digits()
    train = DataLoader(
        TensorDataset(data.train_x, data.train_y),
        batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    return train, DataLoader(TensorDataset(data.validation_x, data.validation_y), batch_size=256)


def train_loader() -> DataLoader[tuple[Tensor, ...]]:
    """The training half, for the command line: `examples/digits.py:train_loader`."""
    return loaders()[0]


def validation_loader() -> DataLoader[tuple[Tensor, ...]]:
    """The validation half, for the command line: `examples/digits.py:validation_loader`."""
    return loaders()[1]
