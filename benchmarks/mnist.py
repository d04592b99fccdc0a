"""MNIST from its four IDX files, in memory."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass
class Batches:
    """Batches of (x, y), in the order of the data or, with a generator, in another one in each pass."""

    x: Tensor
    y: Tensor
    size: int
    generator: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.x))
        if self.generator is not None:
            order = torch.randperm(len(self.x), generator=self.generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            yield self.x[chosen], self.y[chosen]


def read(folder: Path, name: str) -> Tensor:
    """Return the content of `<name>.gz`, an IDX file of bytes.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = folder / f"{name}.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"MNIST is not in '{folder}': '{path.name}' is missing; put its four files there"
        )
    data = gzip.decompress(path.read_bytes())
    sizes = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, data[3] + 1)]
    return torch.frombuffer(bytearray(data[4 + 4 * len(sizes) :]), dtype=torch.uint8).reshape(sizes)


def mnist(batch_size: int, seed: int, folder: Path = FOLDER) -> tuple[Batches, Batches]:
    """Return training and test batches; images [B, 784] in [0, 1], labels [B]."""
    (x, y), (test_x, test_y) = (
        (
            read(folder, f"{part}-images-idx3-ubyte").flatten(1) / 255.0,
            read(folder, f"{part}-labels-idx1-ubyte").long(),
        )
        for part in ("train", "t10k")
    )
    generator = torch.Generator().manual_seed(seed)
    return Batches(x, y, batch_size, generator), Batches(test_x, test_y, 1000)
