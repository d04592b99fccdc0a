"""The data of published results, from files in one folder, in memory."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from locc.errors import LoccError

CONTEXT = 64
"""Characters in a sample of tiny-shakespeare."""
_MNIST = [
    f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass
class Batches:
    """Batches of (x, y), in the order of the data or, with a generator, in another one in each pass.

    With `augment`, images are flipped and moved by up to four pixels at random. What fills no batch is left
    out.
    """

    x: Tensor
    y: Tensor
    size: int
    generator: torch.Generator | None = None
    augment: bool = False

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.x))
        if self.generator is not None:
            order = torch.randperm(len(self.x), generator=self.generator)
        for chosen in order[: len(self) * self.size].to(self.x.device).split(self.size):
            x = self.x[chosen]
            yield (self._moved(x) if self.augment else x), self.y[chosen]

    def _moved(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        drawn = torch.randint(0, 9, (2, n), generator=self.generator).to(x.device)
        flipped = torch.randint(0, 2, (n, 1, 1, 1), generator=self.generator).bool().to(x.device)
        x = functional.pad(torch.where(flipped, x.flip(3), x), (4, 4, 4, 4)).permute(0, 2, 3, 1)
        rows = drawn[0, :, None] + torch.arange(height, device=x.device)
        columns = drawn[1, :, None] + torch.arange(width, device=x.device)
        sample = torch.arange(n, device=x.device)[:, None, None]
        return x[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Split:
    """Samples for training and for the test."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(name: str, folder: Path, samples: int | None = None, tests: int | None = None) -> Split:
    """Return a data set by its name in `DATA`, with the first samples of its training and its test part.

    Raises:
        LoccError: the folder lacks one of its files; the message lists them.
    """
    return DATA[name](folder, samples, tests)


def _found(folder: Path, what: str, files: list[str]) -> list[Path]:
    """Return the files, as they are or with .gz."""
    found = [next((p for p in (folder / f, folder / f"{f}.gz") if p.is_file()), None) for f in files]
    missing = [f for f, path in zip(files, found, strict=True) if path is None]
    if missing:
        raise LoccError(
            f"{what} is not in '{folder}': {', '.join(missing)} missing; put {', '.join(files)} there "
            "(.gz will do), or name their folder by --data or $LOCC_DATA"
        )
    return [path for path in found if path is not None]


def _read(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


@cache
def mnist(folder: Path, samples: int | None, tests: int | None) -> Split:
    """Return MNIST from its four IDX files: images [N, 784] in [0, 1], labels [N]."""
    parts = []
    for path in _found(folder, "MNIST", _MNIST):
        data = _read(path)
        sizes = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, data[3] + 1)]
        parts.append(
            torch.frombuffer(bytearray(data[4 + 4 * len(sizes) :]), dtype=torch.uint8).reshape(sizes)
        )
    x, y, test_x, test_y = parts
    images = [part.flatten(1) / 255.0 for part in (x[:samples], test_x[:tests])]
    return Split(images[0], y[:samples].long(), images[1], test_y[:tests].long())


@cache
def cifar10(folder: Path, samples: int | None, tests: int | None) -> Split:
    """Return CIFAR-10 from an npz of JPEGs: images [N, 3, 32, 32], normalised, and labels [N].

    The file holds `train_jpeg`, bytes of all images, `train_offsets`, where each begins (and the last ends),
    `train_labels`, and the same of `test`.
    """
    (path,) = _found(folder, "CIFAR-10", ["cifar10-jpeg.npz"])
    try:
        from PIL import Image
    except ImportError as error:
        raise LoccError("CIFAR-10 needs Pillow to decode images: pip install 'locc[reproduce]'") from error

    def images(file: np.lib.npyio.NpzFile, part: str, count: int | None) -> tuple[Tensor, Tensor]:
        data, at = file[f"{part}_jpeg"].tobytes(), file[f"{part}_offsets"]
        labels = torch.tensor(file[f"{part}_labels"][:count].astype(np.int64))
        decoded = (Image.open(io.BytesIO(data[at[i] : at[i + 1]])).convert("RGB") for i in range(len(labels)))
        x = torch.from_numpy(np.stack([np.asarray(image) for image in decoded])).permute(0, 3, 1, 2) / 255.0
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
        return (x - mean) / std, labels

    with np.load(path) as file:
        return Split(*images(file, "train", samples), *images(file, "test", tests))


@cache
def shakespeare(folder: Path, samples: int | None, tests: int | None) -> Split:
    """Return tiny-shakespeare: characters [N, T] and the ones that follow; the test is its last tenth."""
    (path,) = _found(folder, "tiny-shakespeare", ["tinyshakespeare.txt"])
    text = _read(path).decode()
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[c] for c in text])
    end = len(ids) * 9 // 10
    parts = []
    for part in (ids[:end], ids[end:]):
        whole = (len(part) - 1) // CONTEXT * CONTEXT
        parts += [part[:whole].reshape(-1, CONTEXT), part[1 : whole + 1].reshape(-1, CONTEXT)]
    x, y, test_x, test_y = parts
    # Windows in another order than the text's, so that the first ones stand for all of it.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:samples]
    return Split(x[order], y[order], test_x[: tests or 512], test_y[: tests or 512])


def bigram(data: Split) -> float:
    """Return the test loss of counted pairs of characters, each counted once more than seen."""
    size = int(max(data.x.max(), data.y.max(), data.test_y.max())) + 1
    pairs = (
        torch.bincount((data.x * size + data.y).flatten(), minlength=size * size).reshape(size, size) + 1.0
    )
    scores = (pairs / pairs.sum(1, keepdim=True)).log()
    return float(-scores[data.test_x, data.test_y].mean())


DATA: dict[str, Callable[[Path, int | None, int | None], Split]] = {
    "mnist": mnist,
    "cifar10": cifar10,
    "shakespeare": shakespeare,
}


def default_folder() -> Path:
    """Return $LOCC_DATA, or ../shared/data."""
    return Path(os.environ.get("LOCC_DATA") or "../shared/data")
