"""`predsim`, `sim` and `pred`: local error signals from similarities and from local classifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from locc.errors import nearest
from locc.nn import Factory
from locc.rewrite import (
    CLASS_IDS,
    LAYOUT,
    LOCAL_LOSS,
    NUMBERS,
    POSITIONS,
    RANK,
    AttachHeads,
    LossLike,
    Method,
    OptimizerSpec,
    Pass,
    Recipe,
    option,
)
from locc_passes.proxy.similarity import (
    AttachSignHeads,
    AttachSimilarityHeads,
    LocalErrors,
    OutputError,
    complement,
)
from locc_passes.proxy.unsupervised import Unsupervised

UNSUPERVISED = ("none", "sim", "recon")


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

    With `bio`, the paper's biologically plausible variant: z(h) is h; a fixed random matrix P brings labels y
    to `target_proj_size` numbers; sim has S(P y) for S(Y), and pred is the binary cross-entropy of the signs
    [P y > 0], whose classifier passes its error through a fixed random matrix. With `loss_unsup` the
    objective is alpha unsup + (1 - alpha) of it. Both as in the released code.
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

    beta: float | None = option(
        None,
        "weight of sim; 1 - beta is that of pred; unless given, 0.99, and 0.01 with bio",
        range=(0.0, 1.0),
    )
    output_weight: float | None = option(
        None,
        "weight of the last module's loss; unless given, 1 - beta, and 1 where beta is 0 or 1. A "
        "single module always counts in full",
        range=(0.001, 1.0),
        scale="log",
    )
    dim_in_decoder: int = option(
        4096, "largest number of features that the classifiers of pred read", range=(64, 8192), scale="log"
    )
    positions: float | None = option(None, **POSITIONS)
    rank: int | None = option(None, **RANK)
    undropped: bool = option(True, "take h before the dropout that ends a module, as published")
    layout: str | None = option(None, **LAYOUT)
    local_loss: LossLike | None = option(None, **LOCAL_LOSS)
    zero_output: bool = option(
        False, "start the weight of the output layer at zero, as the released code does"
    )
    bio: bool = option(False, "the biologically plausible variant: projected labels, no map z")
    target_proj_size: int = option(
        128, "with bio: numbers that a label is projected to", range=(8, 1024), scale="log"
    )
    loss_unsup: str = option(
        "none",
        "a local loss without labels: sim (the similarities of the module's input) or recon (the "
        "input itself; the first module has none)",
        choices=UNSUPERVISED,
    )
    alpha: float = option(
        0.5, "weight of loss_unsup, if there is one; 1 - alpha is then that of sim and pred", range=(0.0, 0.9)
    )
    sim_head: Factory | None = option(None, "factory (boundary spec, output spec) -> module of z(h)")
    pred_head: Factory | None = option(None, "factory (boundary spec, output spec) -> classifier")

    def __post_init__(self) -> None:
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}: give a weight from 0 (pred) to 1 (sim)")
        if self.output_weight is not None and not self.output_weight > 0:
            raise ValueError(f"output_weight={self.output_weight}: give a weight above 0")
        if self.dim_in_decoder < 1:
            raise ValueError(f"dim_in_decoder={self.dim_in_decoder}: give at least 1")
        if self.target_proj_size < 1:
            raise ValueError(f"target_proj_size={self.target_proj_size}: give at least 1")
        if self.loss_unsup not in UNSUPERVISED:
            raise ValueError(f"loss_unsup={self.loss_unsup!r}; {nearest(self.loss_unsup, UNSUPERVISED)}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha}: give a weight from 0 to below 1")
        parts = ("sim_head", "pred_head", "local_loss", "positions", "rank")
        own = [name for name in parts if getattr(self, name) is not None]
        if self.bio and own:
            raise ValueError(f"bio=True has its own heads and loss; leave out {', '.join(own)}")

    def opened(self, model: nn.Module, splits: Sequence[str]) -> Iterator[str]:
        """Yield the dropout layers that may end a split submodule, so that h before them can be seen."""
        if self.undropped:
            for split in splits:
                yield from _ending(model.get_submodule(split), split)

    def passes(self) -> Sequence[Pass]:
        """Return the two kinds of heads, the local objectives, and the loss at the output."""
        beta = (0.01 if self.bio else 0.99) if self.beta is None else self.beta
        alpha = 0.0 if self.loss_unsup == "none" else self.alpha
        projected = self.target_proj_size if self.bio else None
        steps: list[Pass] = []
        if beta > 0 or self.loss_unsup == "sim":
            steps.append(
                AttachSimilarityHeads(
                    self.sim_head, self.layout, self.undropped, projected, self.dim_in_decoder
                )
            )
        if beta < 1:
            steps.append(self._classifiers())
        if alpha:
            steps.append(Unsupervised(weights=(alpha, alpha), undropped=self.undropped, kind=self.loss_unsup))
        weight = self.output_weight
        if weight is None:
            weight = complement(beta) if 0 < beta < 1 else 1.0
        return (
            *steps,
            LocalErrors(beta, self.local_loss, self.label, alpha),
            OutputError(weight, self.zero_output),
        )

    def _classifiers(self) -> Pass:
        if self.bio:
            return AttachSignHeads(self.target_proj_size, self.dim_in_decoder, self.layout, self.undropped)
        options = {} if self.pred_head else {"dim_in_decoder": self.dim_in_decoder}
        head = self.pred_head or "pred"
        return AttachHeads(head, self.layout, self.undropped, options, self.positions, self.rank)


@dataclass(frozen=True)
class Sim(PredSim):
    """`predsim` with beta = 1: each module matches the similarities of the labels, without a classifier."""

    label: ClassVar[str] = "sim"

    beta: float | None = field(default=1.0, init=False)
    dim_in_decoder: int = field(default=4096, init=False)
    positions: float | None = field(default=None, init=False)
    rank: int | None = field(default=None, init=False)
    local_loss: LossLike | None = field(default=None, init=False)
    pred_head: Factory | None = field(default=None, init=False)


@dataclass(frozen=True)
class Pred(PredSim):
    """`predsim` with beta = 0: each module trains on the loss of a local linear classifier."""

    target: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[str] = "pred"

    beta: float | None = field(default=0.0, init=False)
    bio: bool = field(default=False, init=False)
    target_proj_size: int = field(default=128, init=False)
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
