"""`dni` and `cdni`: modules that train on predicted gradients, without waiting for the modules after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from locc.errors import MethodError, nearest
from locc.ir import TrainingGraph
from locc.nn import Factory
from locc.rewrite import (
    LentGradients,
    Method,
    OptimizerSpec,
    OutputLoss,
    Pass,
    Recipe,
    has_norms,
    option,
    unreached,
)
from locc_passes.synthetic.carried import CarriedState
from locc_passes.synthetic.inputs import SyntheticInputs
from locc_passes.synthetic.passes import Bootstrap, SyntheticGradients

REDUCTIONS = ("mean", "sum")

FAST = 1e-4
"""The rate above which modules without normalisation run away."""


@dataclass(frozen=True)
class DNI(Method):
    """Decoupled neural interfaces: each module trains at once on a predicted gradient of its output.

    The auxiliary owner `<module>.synthesiser` predicts the gradient from the module's output, and learns from
    the one that the next module computes from its own prediction (the last: from the loss); no backward pass
    runs through the network. A synthesiser starts at zero, so the first update of each hidden module is zero.

    A synthesiser has to follow modules that move: at a rate far above the published one they drive its
    predictions, and training gets worse with time. In a sequence it sees one position at a time, and what
    later ones send back through attention it cannot know; a `factory` that mixes positions, later ones too,
    learns that (no inference runs through it).

    What a step costs are the synthesisers: one forward and one backward pass of each, and its update. For a
    value of n units one has width * (2 n + width) weights. At 784-400-400-400-10 in four modules these are
    8.8 times the network's with the published width of 1024, and 0.6 times with `width=128`; all else is a
    step of backpropagation, in pieces.

    A parameter lent to a later module (`tied="owner"`) gets the borrower's gradient as it is, and its owner
    waits for it. With `inputs=True` the forward pass is unlocked too: in training a module reads what its
    auxiliary `<module>.inputs` predicts from the model's input, which learns from what the module before
    sends. Evaluation, inference and export run on the real values, with BatchNorm's statistics of training.

    A recurrent model learns beyond the chunk of a sequence that a step sees with `carry=("h0",)`, or for an
    LSTM `("h0", "c0")`: its states are kept from step to step, and `<module>.carried` predicts from them the
    gradient of all later chunks. Splits are not needed for that. A flag [B] among the inputs, by which the
    model itself starts a sample anew, ends a sequence. No synthesiser of a state sees labels.
    """

    family: ClassVar[str] = "synthetic"
    reference: ClassVar[str] = (
        "Jaderberg et al. 2017, Decoupled neural interfaces using synthetic gradients; Czarnecki et al. 2017"
    )
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("adam", 3e-5),
        source="Jaderberg et al. 2017: modules and synthesisers at one rate; batches of 256, long runs",
        network="BatchNorm in every module",
    )
    labelled: ClassVar[bool] = False

    width: int | None = option(
        None,
        "hidden width of a synthesiser (default 1024, or 128 channels for images), "
        "on which the cost of a step depends most",
        range=(32, 2048),
        scale="log",
    )
    lr_scale: float = option(
        1.0,
        "multiplies the learning rate of the synthesisers, the recipe's or your optimizer's",
        range=(0.1, 100.0),
        scale="log",
    )
    reduction: str = option("mean", "'mean' or 'sum': how the loss joins the samples of a batch")
    trace: float = option(
        0.0,
        "lambda: the share of the next module's target, against its prediction, in what comes "
        "back through it to be predicted; 1 is the true gradient, and the whole backward pass",
        range=(0.0, 1.0),
    )
    inputs: bool = option(False, "in training, modules read what a network predicts from the model's input")
    carry: tuple[str, ...] = option(
        (),
        "inputs that hold a recurrent state: in training they are what the model's last outputs, "
        "in this order, were in the step before, and a synthesiser predicts the gradient behind a chunk",
    )
    carry_scale: float = option(
        0.1,
        "multiplies the synthetic gradient at the end of a chunk (0.1: dni-pytorch's example); 0 "
        "is truncated backpropagation through time",
        range=(0.0, 1.0),
    )
    factory: Factory | None = option(
        None,
        "(value's spec, output's spec) -> network of the value; for cdni of (value, labels), "
        "which are class ids in the shape of the value's rows, or vectors with the classes last",
    )

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise MethodError(f"reduction={self.reduction!r}; {nearest(str(self.reduction), REDUCTIONS)}")
        if not self.lr_scale > 0:
            raise MethodError(f"lr_scale={self.lr_scale!r}: give a factor above 0")
        if not 0 <= self.trace <= 1:
            raise MethodError(f"trace={self.trace!r}: give a share between 0 and 1")
        if isinstance(self.carry, str):
            raise MethodError(f"carry={self.carry!r}: give a tuple of names, ({self.carry!r},)")
        if self.width is not None and self.width < 1:
            raise MethodError(f"width={self.width!r}: give at least 1")

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse modules to which nothing comes back."""
        yield from unreached(ir)

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of modules that move faster than synthesisers can follow."""
        fast = [module.name for module in ir.modules[:-1] if rates.get(module.name, 0) > FAST]
        if fast and not has_norms(ir):
            yield (
                f"module '{fast[0]}' has a learning rate of {rates[fast[0]]:g} and the network no "
                "normalisation, so that activations and the gradients predicted for them drive each other "
                f"up; lower the rate (published: {self.recipe.modules.lr:g}, which optimizer=None takes), or "
                "put an nn.BatchNorm into each module"
            )

    def passes(self) -> Sequence[Pass]:
        """Return the loss, the predictions, and what the synthesisers learn from."""
        mean = self.reduction == "mean"
        own = None if self.labelled else self.factory
        carried = (
            (CarriedState(self.carry, self.carry_scale, self.width, self.lr_scale, mean, own),)
            if self.carry
            else ()
        )
        inputs = (SyntheticInputs(self.width, self.lr_scale),) if self.inputs else ()
        return (
            OutputLoss(),
            SyntheticGradients(self.labelled, self.width, self.lr_scale, mean, self.factory),
            LentGradients(),
            *carried,
            Bootstrap(mean, self.trace),
            *inputs,
        )


@dataclass(frozen=True)
class CDNI(DNI):
    """Decoupled neural interfaces whose synthesisers see the labels: holds in deeper networks than `dni`.

    As `dni`; the labels (of the sample, token or pixel) enter each synthesiser one-hot, by a linear map added
    after its first layer. A target that is no class enters as the vector it is. Inference never reads it.
    """

    labelled: ClassVar[bool] = True
