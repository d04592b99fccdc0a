"""`altmin`: online alternating minimisation with codes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx
from torch.nn import functional

from locc.ir import TrainingGraph
from locc.losses import Loss
from locc.rewrite import Method, OptimizerSpec, Pass, Recipe, add_all, is_rectified, range_of
from locc_passes.auxiliary_variables.codes import InnerSteps, code_of, coded, mean_abs


@dataclass(frozen=True)
class FitCodes(Pass):
    """Trains each module on its codes.

    The last module has the user's loss, given the codes that it reads; every other module has
    mean (f(c) - sg c')^2 + lambda_w * mean |W|, with c the codes that it reads (the data, for the first
    one), c' those that it sends, and W each of its weights of two or more dimensions.
    """

    lambda_w: float = 0.0
    output_lr: float = 1.0

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the objectives; all of them read the same weights, those of before the update."""
        ir.apply_loss()  # of the plain forward: a step reports it, and it moves the last module's buffers
        ir.scale_lr(ir.last.name, self.output_lr)
        for module in ir.modules:
            owner = module.name
            codes = {b.entry: ir.stop_gradient(owner, code_of(b)) for b in coded(ir, consumer=owner)}
            sent = coded(ir, producer=owner)
            if module == ir.last:
                output = self._run(ir, owner, codes, [ir.output])[0]
                loss = ir.loss_of(owner, output)
                ir.objective(owner, loss, "loss")
                continue
            found = self._run(ir, owner, codes, [b.value for b in sent])
            terms = [
                ir.emit(
                    owner,
                    functional.mse_loss,
                    value,
                    ir.stop_gradient(owner, code_of(b)),
                    role="fit",
                )
                for value, b in zip(found, sent, strict=True)
            ]
            ir.objective(owner, add_all(ir, owner, terms + self._sparsity(ir, owner)), "codes")

    @staticmethod
    def _run(
        ir: TrainingGraph, owner: str, codes: dict[fx.Node, fx.Node], wanted: list[fx.Node]
    ) -> list[fx.Node]:
        return ir.replay(owner, codes, wanted, role="replay") if codes else wanted

    def _sparsity(self, ir: TrainingGraph, owner: str) -> list[fx.Node]:
        if not self.lambda_w:
            return []
        terms = []
        for path, parameter in ir.parameters(owner).items():
            if parameter.dim() > 1 and parameter.requires_grad:
                size = ir.emit(owner, mean_abs, ir.read(owner, path), role="sparsity")
                terms.append(ir.emit(owner, operator.mul, size, self.lambda_w, role="sparsity"))
        return terms


@dataclass(frozen=True)
class AltMin(Method):
    """Alternating minimisation: codes between the modules first, then each module on its own codes.

    The codes are the modules' outputs, so cut after linear (and normalisation) layers, before the
    nonlinearity; the last module has none. They are made anew for every batch. The settings are those of
    the released code, tuned with BatchNorm and cross-entropy. A squared loss counts 1 / mu times in the
    energy of the codes, and the inner steps diverge once rate x curvature is above
    2 (1 + momentum) / (1 + 2 momentum) = 1.36.

    Two things differ from the released code: BatchNorm's statistics move once in a step, not with each of its
    forwards; and its second variant (running sums of codes, coordinate descent on the weights) is not here.
    """

    family: ClassVar[str] = "auxiliary variables"
    reference: ClassVar[str] = "Choromanska et al. 2019"
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("adam", 0.008),
        source="Choromanska et al. 2019, released code; batches of 200, halved every 8 epochs",
        network="BatchNorm after each linear layer, and no bias there",
    )

    steps: int = field(default=5, metadata={"help": "inner steps on the codes of a module", "range": (1, 20)})
    rate: float = field(
        default=0.3,
        metadata={"help": "learning rate of the inner steps", "range": (0.01, 1.0), "scale": "log"},
    )
    momentum: float = field(
        default=0.9, metadata={"help": "Nesterov momentum of the inner steps", "range": (0.0, 0.99)}
    )
    mu: float = field(
        default=0.003,
        metadata={
            "help": "weight of the codes' constraint against the loss",
            "range": (0.0001, 1.0),
            "scale": "log",
        },
    )
    mu_step: float = field(
        default=0.0, metadata={"help": "growth of mu with each batch, up to 10 x mu", "range": (0.0, 0.0001)}
    )
    lambda_c: float = field(
        default=0.0, metadata={"help": "weight of the mean size of the codes", "range": (0.0, 0.1)}
    )
    lambda_w: float = field(
        default=0.0, metadata={"help": "weight of the mean size of the weights", "range": (0.0, 0.1)}
    )

    output_lr: float = field(
        default=1.0,
        metadata={
            "help": "learning rate of the last module, in units of the others'",
            "range": (0.01, 10.0),
            "scale": "log",
        },
    )

    def __post_init__(self) -> None:
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

    def passes(self) -> Sequence[Pass]:
        """Return the inner steps and the objectives."""
        inner = InnerSteps(self.steps, self.rate, self.momentum, self.mu, self.mu_step, self.lambda_c)
        return (inner, FitCodes(self.lambda_w, self.output_lr))
