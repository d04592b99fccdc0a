"""`altmin`: online alternating minimisation with codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from locc.ir import TrainingGraph
from locc.losses import Loss
from locc.rewrite import Method, OptimizerSpec, Pass, Recipe, is_rectified, option, range_of
from locc_passes.auxiliary_variables.codes import InnerSteps, coded
from locc_passes.auxiliary_variables.fits import FitCodes, RememberCodes


@dataclass(frozen=True)
class AltMin(Method):
    """Alternating minimisation: codes between the modules first, then each module on its own codes.

    The codes are the modules' outputs, so cut after linear (and normalisation) layers, before the
    nonlinearity; the last module has none. They are made anew for every batch. The settings are those of
    the released code, tuned with BatchNorm and cross-entropy. A squared loss counts 1 / mu times in the
    energy of the codes, and the inner steps diverge once rate x curvature is above
    2 (1 + momentum) / (1 + 2 momentum) = 1.36.

    As in that code, BatchNorm's statistics move with each forward of a step: those of the first module twice
    (to make codes, and to learn), of the others once more with each inner step on the codes that they read.
    One thing differs: here a code is pulled to its first value, as in the paper; in that code the pull has no
    gradient, for the first value is a clone on the same tape.

    With memory=True the hidden weights are set by coordinate descent on running sums of all codes so far, as
    the released code's second variant does; its networks have no BatchNorm.
    """

    family: ClassVar[str] = "auxiliary variables"
    reference: ClassVar[str] = "Choromanska et al. 2019"
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("adam", 0.008),
        source="Choromanska et al. 2019, released code; batches of 200, halved every 8 epochs",
        network="BatchNorm after each linear layer, and no bias there",
    )

    steps: int = option(5, "inner steps on the codes of a module", range=(1, 20))
    rate: float = option(0.3, "learning rate of the inner steps", range=(0.01, 1.0), scale="log")
    momentum: float = option(0.9, "Nesterov momentum of the inner steps", range=(0.0, 0.99))
    mu: float = option(
        0.003, "weight of the codes' constraint against the loss", range=(0.0001, 1.0), scale="log"
    )
    mu_step: float = option(0.0, "growth of mu with each batch, up to 10 x mu", range=(0.0, 0.0001))
    lambda_c: float = option(0.0, "weight of the mean size of the codes", range=(0.0, 0.1))
    lambda_w: float = option(0.0, "weight of the mean size of the weights", range=(0.0, 0.1))

    output_lr: float = option(
        1.0, "learning rate of the last module, in units of the others'", range=(0.01, 10.0), scale="log"
    )

    memory: bool = option(False, "fit hidden linear layers to the codes of all batches, column by column")
    forget: float = option(
        0.0, "of the memory: the share of it that each batch replaces; 0 sums all batches", range=(0.0, 0.5)
    )
    sweeps: int = option(1, "of the memory: sweeps over the columns in a step", range=(1, 20))

    def __post_init__(self) -> None:
        if self.sweeps < 1 or not 0 <= self.forget < 1:
            raise ValueError(
                f"sweeps={self.sweeps}, forget={self.forget}: give at least one sweep, and a share below 1"
            )
        if not self.output_lr > 0:
            raise ValueError(f"output_lr={self.output_lr}: give a factor above 0")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least one inner step is needed")
        if not self.mu > 0:
            raise ValueError(f"mu={self.mu}: the loss is divided by it, so it must be above 0")

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of cuts after a nonlinearity, and of a loss on which the inner steps may diverge."""
        if len(ir.modules) > 1 and Loss.of(ir.loss_function).name == "mse":
            yield (
                f"a squared loss counts 1/mu = {1 / self.mu:.0f} times in the energy of the codes, whose "
                f"inner steps of rate={self.rate:g} were set with cross-entropy and may diverge on it; lower "
                "rate, or raise mu"
            )
        values = dict.fromkeys(b.value for b in coded(ir))
        bent = [v for v in values if is_rectified(v, ir.root) or range_of(v, ir.root) != "linear"]
        if bent:
            names = ", ".join(dict.fromkeys(f"'{v.meta['owner']}'" for v in bent))
            yield (
                f"modules {names} end in a nonlinearity, and a code stands for what enters one; split after "
                "the linear layers (or their normalisation), before the nonlinearity"
            )

    def opened(self, model: nn.Module, splits: Sequence[str]) -> Iterator[str]:
        """Yield the layers that the memory fits."""
        if self.memory:
            yield from (name for name, part in model.named_modules() if name and isinstance(part, nn.Linear))

    def passes(self) -> Sequence[Pass]:
        """Return the inner steps and the objectives."""
        inner = InnerSteps(self.steps, self.rate, self.momentum, self.mu, self.mu_step, self.lambda_c)
        weights = (self.lambda_w, self.output_lr)
        fit = RememberCodes(*weights, self.forget, self.sweeps) if self.memory else FitCodes(*weights)
        return (inner, fit)
