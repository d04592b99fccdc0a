"""`predsim`, `sim` and `pred`: local error signals from similarities and from local classifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from locc.nn import Factory
from locc.rewrite import CLASS_IDS, NUMBERS, AttachHeads, LossLike, Method, OptimizerSpec, Pass, Recipe
from locc_passes.proxy.similarity import AttachSimilarityHeads, LocalErrors, OutputError, complement


@dataclass(frozen=True)
class PredSim(Method):
    """Local error signals: each module matches the similarities of the labels and predicts them.

    With h the module's output before the dropout that ends it: sim is the mean square over all B^2 entries
    of S(z(h)) - S(Y), where S compares samples by the standard deviations of their channels; pred is the
    loss of a linear classifier on pooled h, starting at zero. The objective is beta sim + (1 - beta) pred;
    the next module receives sg[dropout(h)]. Nokland & Eidnes, "Training neural networks with local error
    signals" (2019), and its released code.

    Dropout counts as ending a module if its result is what the module sends: an `nn.Dropout*` or a dropout
    function, also as the last layer of an `nn.Sequential` that a split names, or inside the forward of a
    submodule that a split names. Dropout deeper inside is the module's own business.
    """

    family: ClassVar[str] = "proxy"
    reference: ClassVar[str] = "Nokland & Eidnes 2019, Training neural networks with local error signals"
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("adam", 5e-4),
        source="Nokland & Eidnes 2019, released code; batches of 128, 400 epochs, quartered late",
        network="BatchNorm before each ReLU, and dropout after it",
    )
    target: ClassVar[tuple[str, ...]] = (CLASS_IDS, NUMBERS)
    label: ClassVar[str] = "predsim"

    beta: float = field(
        default=0.99, metadata={"help": "weight of sim; 1 - beta is that of pred", "range": (0.0, 1.0)}
    )
    output_weight: float | None = field(
        default=None,
        metadata={
            "help": "weight of the last module's loss; unless given, 1 - beta, and 1 where beta is 0 or 1. A "
            "single module always counts in full",
            "range": (0.001, 1.0),
            "scale": "log",
        },
    )
    dim_in_decoder: int = field(
        default=4096,
        metadata={
            "help": "largest number of features that the classifiers of pred read",
            "range": (64, 8192),
            "scale": "log",
        },
    )
    undropped: bool = field(
        default=True, metadata={"help": "take h before the dropout that ends a module, as published"}
    )
    layout: str | None = field(
        default=None,
        metadata={"help": "where the dimensions of boundaries are, if the guess from shapes is wrong"},
    )
    local_loss: LossLike | None = field(
        default=None,
        metadata={"help": "loss of (head output, target), by name or callable; the user's own unless given"},
    )
    zero_output: bool = field(
        default=False,
        metadata={"help": "start the weight of the output layer at zero, as the released code does"},
    )
    sim_head: Factory | None = field(
        default=None, metadata={"help": "factory (boundary spec, output spec) -> module of z(h)"}
    )
    pred_head: Factory | None = field(
        default=None, metadata={"help": "factory (boundary spec, output spec) -> classifier"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}: give a weight from 0 (pred) to 1 (sim)")
        if self.output_weight is not None and not self.output_weight > 0:
            raise ValueError(f"output_weight={self.output_weight}: give a weight above 0")
        if self.dim_in_decoder < 1:
            raise ValueError(f"dim_in_decoder={self.dim_in_decoder}: give at least 1")

    def opened(self, model: nn.Module, splits: Sequence[str]) -> Iterator[str]:
        """Yield the dropout layers that may end a split submodule, so that h before them can be seen."""
        if self.undropped:
            for split in splits:
                yield from _ending(model.get_submodule(split), split)

    def passes(self) -> Sequence[Pass]:
        """Return the two kinds of heads, the local objectives, and the loss at the output."""
        options = {} if self.pred_head else {"dim_in_decoder": self.dim_in_decoder}
        steps: list[Pass] = []
        if self.beta > 0:
            steps.append(AttachSimilarityHeads(self.sim_head, self.layout, self.undropped))
        if self.beta < 1:
            steps.append(AttachHeads(self.pred_head or "pred", self.layout, self.undropped, options))
        weight = self.output_weight
        if weight is None:
            weight = complement(self.beta) if 0 < self.beta < 1 else 1.0
        return (
            *steps,
            LocalErrors(self.beta, self.local_loss, self.label),
            OutputError(weight, self.zero_output),
        )


@dataclass(frozen=True)
class Sim(PredSim):
    """`predsim` with beta = 1: each module matches the similarities of the labels, without a classifier."""

    label: ClassVar[str] = "sim"

    beta: float = field(default=1.0, init=False)
    dim_in_decoder: int = field(default=4096, init=False)
    local_loss: LossLike | None = field(default=None, init=False)
    pred_head: Factory | None = field(default=None, init=False)


@dataclass(frozen=True)
class Pred(PredSim):
    """`predsim` with beta = 0: each module trains on the loss of a local linear classifier."""

    target: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[str] = "pred"

    beta: float = field(default=0.0, init=False)
    sim_head: Factory | None = field(default=None, init=False)


def _ending(module: nn.Module, path: str) -> Iterator[str]:
    """Yield the paths of the dropout layers by which a submodule's forward may end."""
    if isinstance(module, nn.Sequential):
        if len(module):
            name = list(module._modules)[-1]
            yield from _ending(module[-1], f"{path}.{name}")
    elif isinstance(module, nn.modules.dropout._DropoutNd):
        yield path
    elif type(module).__module__.partition(".")[0] != "torch":
        for name, child in module.named_children():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                yield f"{path}.{name}"
