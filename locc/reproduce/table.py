"""What is trained again: settings (a network, data, budgets) with a row for each method."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from locc.errors import LoccError, nearest
from locc.recipes import OptimizerSpec, Recipe
from locc.reproduce import networks
from locc.reproduce.data import MEAN, STD, Split, bigram

Rate = Callable[[float], float]
"""What multiplies the learning rate when a part of the training, 0 to 1, is over."""
ADAM = Recipe()


@dataclass(frozen=True)
class Budget:
    """How long a row trains.

    Attributes:
        epochs: passes over the samples.
        batch: samples in a batch; -1 is all of them.
        samples: the first so many of the training set; None is all of them.
        faster: multiplies the learning rates of the recipe, for a training far shorter than published.
        tests: the first so many of the test set; None is all of them.
    """

    epochs: int
    batch: int
    samples: int | None = None
    faster: float = 1.0
    tests: int | None = None

    def __str__(self) -> str:
        batch = "full batch" if self.batch < 0 else f"batches of {self.batch}"
        samples = "all samples" if self.samples is None else f"{self.samples} samples"
        faster = "" if self.faster == 1 else f", {self.faster:g} x the recipe's rates"
        return f"{self.epochs} epochs of {samples}, {batch}{faster}"


@dataclass(frozen=True)
class Row:
    """One training of a setting.

    Attributes:
        method: the id of the method; unused with `score`.
        name: of the row; the method's unless given.
        options: of the method.
        recipe: None is the method's own; "published" the one that it was published with.
        splits: in the place of the setting's.
        published: percent correct in the publication, and where that was read.
        source: of `published`.
        word: what is to be said of the result.
        budgets: in the place of the setting's.
        score: what is computed from the data instead of a training.
    """

    method: str
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | str | None = None
    splits: Sequence[str] | int | None = None
    published: float | None = None
    source: str = ""
    word: str = ""
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    score: Callable[[Split], float] | None = None


@dataclass(frozen=True)
class Setting:
    """A network on some data, and the methods that train it.

    Attributes:
        name: the first part of the entries' ids.
        title: for people.
        data: a name of `locc.reproduce.data.DATA`.
        network: makes it; its weights depend on PyTorch's random state alone.
        splits: where it is cut.
        budgets: by name.
        rows: the trainings; `bp` is among them.
        every: whether every other registered method has a row with its defaults and the recipe of `bp`'s row.
        rate: the schedule of the learning rates.
        double: whether it trains in float64.
        augment: whether images are flipped and moved.
        loss: whether it is judged by the test loss rather than by accuracy.
        seeds: how many, unless told otherwise.
        note: what to know of the setting.
    """

    name: str
    title: str
    data: str
    network: Callable[[], nn.Module]
    splits: Sequence[str]
    budgets: Mapping[str, Budget]
    rows: Sequence[Row]
    every: bool = False
    rate: Rate | None = None
    double: bool = False
    augment: bool = False
    loss: bool = False
    seeds: int = 3
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A row of a setting."""

    setting: Setting
    row: Row

    @property
    def id(self) -> str:
        """The setting's name and the row's."""
        return f"{self.setting.name}/{self.row.name or self.row.method}"

    def budget(self, name: str) -> Budget | None:
        """Return a budget by its name; "try" is a few steps, for every entry."""
        if name == "try":
            full = self.row.budgets.get("full") or [*self.setting.budgets.values()][-1]
            batch = min(full.batch, 128) if full.batch > 0 else 128
            return replace(full, epochs=1, batch=batch, samples=3 * batch, tests=500)
        return self.row.budgets.get(name) or self.setting.budgets.get(name)


def drops(factor: float, *at: float) -> Rate:
    """Return a rate that is multiplied by `factor` at each of these parts of the training."""
    return lambda done: factor ** sum(done >= a for a in at)


def cosine(warm: float) -> Rate:
    """Return a rate that rises for a part `warm` of the training, and falls as a cosine."""
    return lambda done: min((done + 1e-3) / warm, 1.0) * (1 + math.cos(math.pi * done)) / 2


def entries() -> dict[str, Entry]:
    """Return all entries by id."""
    from locc.registry import registered

    found = []
    for setting in SETTINGS:
        found += [Entry(setting, row) for row in setting.rows]
        if setting.every:
            here, recipe = {row.method for row in setting.rows}, setting.rows[0].recipe
            others = sorted(set(registered()) - here)
            cut = {m: [f"{s}.0" for s in setting.splits] for m in BEFORE if setting.data == "mnist"}
            found += [Entry(setting, Row(m, recipe=recipe, splits=cut.get(m))) for m in others]
    return {entry.id: entry for entry in found}


def select(ids: Iterable[str], budget: str) -> list[Entry]:
    """Return the entries with a budget that ids, names of settings or globs name; all without any.

    Raises:
        LoccError: one names nothing, or nothing with that budget.
    """
    known = {name: e for name, e in entries().items() if e.budget(budget) is not None}
    if not known:
        budgets = sorted({b for s in SETTINGS for b in s.budgets})
        raise LoccError(f"there is no budget '{budget}'; there are {', '.join(budgets)} and try")
    chosen: dict[str, Entry] = {}
    for wanted in ids:
        found = {n: e for n, e in known.items() if fnmatch.fnmatchcase(n, wanted) or e.setting.name == wanted}
        if not found:
            where = f"there is no entry '{wanted}' with the budget '{budget}'"
            raise LoccError(f"{where}; {nearest(wanted, [*known, *dict.fromkeys(s.name for s in SETTINGS)])}")
        chosen |= found
    return list((chosen or known).values())


NESTEROV = Recipe(OptimizerSpec("sgd", 0.8, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}))
BEFORE = ("altmin", "pair-proxy")
"""These cut before the nonlinearity."""
READ = "read"
"""The number was read in the publication, its survey or its released logs."""
RECALLED = "recalled"
"""The number is quoted from memory of the publication, and was not checked."""
SEVEN = ["0", "1", "2", "3", "4", "5", "6"]


def _seven(init: networks.Init | None) -> nn.Module:
    return networks.mlp(784, *[240] * 7, 10, activation=nn.Tanh, init=init)


MNIST = (
    Setting(
        "al-mlp",
        "MLP of AL: 784-1024-1024-5120-1024-1024-10",
        "mnist",
        networks.associated_mlp,
        ["0", "1", "2", "3"],
        {"cpu": Budget(1, 32, 6000, 10.0), "full": Budget(200, 32)},
        [
            Row("bp", recipe=Recipe(OptimizerSpec("adam", 1e-4)), published=98.5, source=READ),
            Row("al", published=98.6, source=READ),
            Row(
                "dtp",
                recipe="published",
                published=96.43,
                source=READ,
                word="at chance in the budget `cpu`: its rates were published for tanh, and these are ELUs",
            ),
        ],
        rate=drops(0.1, 0.4, 0.6, 0.8),
        note="The publication's own run of `dtp` used a network of its own; here it trains this one.",
    ),
    Setting(
        "predsim-mlp",
        "MLP of local error signals: 784-3x1024-10, BatchNorm, dropout 0.1",
        "mnist",
        lambda: networks.mlp(
            784, 1024, 1024, 1024, 10, activation=lambda: nn.LeakyReLU(0.01), norm=True, dropout=0.1
        ),
        ["0", "1", "2"],
        {"cpu": Budget(1, 128, 12000), "full": Budget(100, 128)},
        [
            Row("bp", recipe=Recipe(OptimizerSpec("adam", 5e-4)), published=99.25, source=READ),
            Row("predsim", options={"dim_in_decoder": 1024}, published=99.38, source=READ),
        ],
        rate=drops(0.25, 0.5, 0.75, 0.89, 0.94),
    ),
    Setting(
        "dtp-mlp",
        "MLP of DTP: 784-7x240-10, tanh, orthogonal start",
        "mnist",
        lambda: _seven(networks.orthogonal),
        SEVEN,
        {"cpu": Budget(1, 100, 30000), "full": Budget(100, 100)},
        [
            Row("bp", recipe=ADAM, published=98.14, source=RECALLED),
            Row("dtp", recipe="published", published=98.06, source=RECALLED),
        ],
    ),
    Setting(
        "drl-mlp",
        "MLP of DTP-DRL: 784-5x256-10, tanh, Xavier start, float64",
        "mnist",
        lambda: networks.mlp(784, *[256] * 5, 10, activation=nn.Tanh, init=networks.xavier),
        ["0", "1", "2", "3", "4"],
        {"cpu": Budget(1, 128, 4000, 3.0), "full": Budget(100, 128)},
        [
            Row("bp", recipe=Recipe(OptimizerSpec("adam", 4.33e-4)), published=98.02, source=RECALLED),
            Row("dtp-drl", published=97.79, source=RECALLED),
            Row("ddtp-linear", published=97.96, source=RECALLED),
            Row(
                "ddtp-rhl",
                published=97.90,
                source=RECALLED,
                word="in the budget `cpu`, at 3 x the recipe's rates, one of three seeds stays at 30 %; at "
                "the recipe's own it reaches 77 % in the same steps",
            ),
        ],
        double=True,
        note="`bp` trains at the rate that `dtp-drl` has for its forward weights.",
    ),
    Setting(
        "cdni-mlp",
        "MLP of DNI: 784-5x256-10, BatchNorm",
        "mnist",
        lambda: networks.mlp(784, *[256] * 5, 10, norm=True),
        ["0", "1", "2", "3", "4"],
        {"cpu": Budget(1, 256, 30000, 10.0), "full": Budget(500, 256)},
        [
            Row("bp", recipe=Recipe(OptimizerSpec("adam", 3e-5)), published=98.2, source=RECALLED),
            Row(
                "dni",
                published=95.7,
                source=RECALLED,
                word="far behind after one pass; released runs take thousands of epochs",
            ),
            Row("cdni", published=98.4, source=RECALLED),
        ],
    ),
    Setting(
        "dfa-mlp",
        "MLP of DFA: 784-7x240-10, tanh",
        "mnist",
        lambda: _seven(None),
        SEVEN,
        {"cpu": Budget(1, 64, 30000, 10.0), "full": Budget(300, 64)},
        [
            Row("bp", recipe=Recipe(OptimizerSpec("rmsprop", 1e-4)), published=97.84, source=RECALLED),
            Row("fa", options={"zero_init": True}, published=97.80, source=RECALLED),
            Row("dfa", options={"zero_init": True}, published=97.68, source=RECALLED),
            Row("ifa"),
        ],
        note="`fa` and `dfa` start from weights of zero, as in the released code; `bp` and `ifa` cannot.",
    ),
    Setting(
        "bcd-mlp",
        "MLP of BCD: 784-3x1500-10",
        "mnist",
        lambda: networks.mlp(784, 1500, 1500, 1500, 10, init=networks.small),
        ["0", "1", "2"],
        {"cpu": Budget(8, -1, 1000), "full": Budget(50, -1)},
        [
            Row("bp", recipe=ADAM, budgets={"cpu": Budget(8, 100, 1000), "full": Budget(50, 100)}),
            Row(
                "bcd3",
                published=94.7,
                source=READ,
                word="the budget `cpu`, 1000 samples and 8 sweeps, is too short to compare",
            ),
        ],
        note="An epoch of `bcd3` is one sweep over the full batch; `bp` takes minibatches. The publication "
        "reports 94.4 to 94.9, and no `bp` on this network.",
    ),
    Setting(
        "altmin-mlp",
        "MLP of alternating minimisation: 784-100-100-10, no bias in hidden layers",
        "mnist",
        lambda: networks.mlp(784, 100, 100, 10, bias=False),
        ["0.0", "1.0"],
        {"cpu": Budget(2, 200), "full": Budget(50, 200)},
        [Row("bp", recipe=ADAM.at(0.008)), Row("altmin")],
        rate=lambda done: 0.5 ** int(done * 6),
        note="The publication shows curves, in which it learns as fast as `bp` or faster, and no "
        "number. `bp` trains at the rate of `altmin`.",
    ),
)

DEFAULTS = tuple(
    Setting(
        f"defaults{suffix}",
        f"784-400-400-400-10{title}, every method with its defaults and its own recipe",
        "mnist",
        lambda norm=norm: networks.mlp(784, 400, 400, 400, 10, norm=norm),  # type: ignore[misc]
        ["0", "1", "2"],
        {"full": Budget(2, 100)},
        [Row("bp")],
        every=True,
    )
    for suffix, title, norm in (("", "", False), ("-norm", ", BatchNorm before each ReLU", True))
)

CIFAR = (
    Setting(
        "small-conv",
        "three 5x5 convolutions of 128 channels",
        "cifar10",
        networks.three_convolutions,
        ["0", "1", "2"],
        {"full": Budget(1500, 256)},
        [
            Row("bp", recipe=Recipe(OptimizerSpec("adam", 3e-5)), published=84.5, source=READ),
            Row("dgl", recipe=Recipe(OptimizerSpec("adam", 3e-5)), published=85.1, source=READ),
            Row("cdni", published=80.9, source=READ),
            Row("dni", published=64.7, source=READ),
        ],
        augment=True,
        note="The numbers are the last lines of the released logs.",
    ),
    Setting(
        "vgg8b",
        "VGG8B, dropout 0.05",
        "cifar10",
        networks.vgg8b,
        ["0", "1", "2", "3", "4", "5", "6"],
        {"full": Budget(400, 128)},
        [
            Row("bp", recipe=Recipe(OptimizerSpec("adam", 5e-4)), published=94.01, source=READ),
            Row("predsim", options={"dim_in_decoder": 2048}, published=94.42, source=READ),
        ],
        rate=drops(0.25, 0.5, 0.75, 0.875, 0.9375),
        augment=True,
    ),
    Setting(
        "resnet32",
        "ResNet-32",
        "cifar10",
        networks.resnet,
        ["8"],
        {"full": Budget(160, 1024)},
        [
            Row("bp", recipe=NESTEROV, published=92.63, source=RECALLED),
            *(
                Row(
                    "infopro",
                    f"infopro-{len(cuts) + 1}",
                    {"task": "contrast", "mean": MEAN, "std": STD, "reconstruction": r, "weight": w},
                    NESTEROV,
                    cuts,
                    published=published,
                    source=RECALLED,
                )
                for cuts, r, w, published in (
                    (["7"], (5.0, 5.0), (1.0, 1.0), 92.24),
                    (["4", "8", "12"], (6.0, 1.0), (0.0, 2.0), 91.42),
                    (["2", "4", "6", "8", "10", "12", "14"], (5.0, 0.0), (0.0, 2.0), 88.87),
                )
            ),
        ],
        rate=cosine(1 / 16),
        augment=True,
    ),
    Setting(
        "al-cnn",
        "CNN of AL: four pairs of 3x3 convolutions",
        "cifar10",
        networks.associated_cnn,
        ["0", "1", "2", "3", "4", "5", "6", "7"],
        {"full": Budget(200, 32)},
        [
            Row("bp", recipe=Recipe(OptimizerSpec("adam", 1e-4)), published=85.2, source=READ),
            Row("al", published=85.8, source=READ),
        ],
        rate=drops(0.1, 0.4, 0.6, 0.8),
    ),
)

MEANS = "its scores rank characters and are no probabilities: see the method's page; judge it by accuracy"
GPT = Setting(
    "gpt",
    "four-block GPT of width 64 on tiny-shakespeare, contexts of 64 characters",
    "shakespeare",
    networks.GPT,
    ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    {"cpu": Budget(1, 8, 2000), "full": Budget(5, 64)},
    [
        Row("bp", recipe=ADAM),
        Row("bigram", score=bigram),
        Row("al", recipe=ADAM, word=MEANS),
        Row("al-pipe", recipe=ADAM, word=MEANS),
        Row("al", "al-dense", {"decoders": "dense"}, ADAM, word=MEANS),
    ],
    every=True,
    loss=True,
    seeds=1,
    note="Every method that is defined on it, with its default options and Adam(lr=0.001), one pass over the "
    "same windows: mean cross-entropy a character, in nats, on text that was held out. A bigram model is "
    "counted on the same windows.",
)

SETTINGS: tuple[Setting, ...] = (*MNIST, *CIFAR, GPT, *DEFAULTS)
