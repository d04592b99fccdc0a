"""`dtp-drl`, `ddtp-linear`, `ddtp-rhl`: target propagation towards Gauss-Newton targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from locc.errors import MethodError, nearest
from locc.ir import TrainingGraph
from locc.nn import ACTIVATIONS, Factory
from locc.rewrite import (
    Activation,
    InverseMaker,
    LentGradients,
    Method,
    OptimizerSpec,
    Pass,
    Recipe,
    option,
    unreached,
)
from locc_passes.target.passes import Inverses, OutputTargets, Turns
from locc_passes.target.reconstruction import DifferenceReconstruction, DirectReturns

REFERENCE = "Meulemans et al. 2020, A theoretical framework for target propagation"
SOURCE = "Meulemans et al. 2020, released configuration for MNIST ({}), its lr divided by its target_stepsize"
NETWORK = "five layers of 256 tanh units that start Xavier-normal, batches of 128, float64"


def _published(file: str, lr: float, beta2: float, eps: float, kind: str, feedback: OptimizerSpec) -> Recipe:
    modules = OptimizerSpec("adam", lr, {"betas": (0.9, beta2), "eps": eps})
    return Recipe(modules, {kind: feedback}, source=SOURCE.format(file), network=NETWORK)


@dataclass(frozen=True)
class DTPDRL(Method):
    """Difference target propagation whose inverses learn what leads from the output back to a layer.

    The prediction's target is one gradient step on the loss; every module, the last included, descends the
    distance of its output to a target that differences of inverses bring down. The inverse `<module>.inverse`
    of each module but the first trains alone, by the difference reconstruction loss: noise on what the module
    reads runs forward to the output and comes back down. With small noise and weight decay, targets are then
    damped Gauss-Newton steps.

    `fit` begins with `warmup` passes over the data that train the inverses alone; each epoch trains both in
    every batch, and ends by `extra` ones for inverses. `step` outside of `fit` trains both. `sigma` is
    in units of the activations. The objective's gradient is about 2 eta / B of backpropagation's for a
    batch of B: Adam rescales it. Where inverses of your own (`factory`) are linear, give them no bias: it
    cancels.
    """

    family: ClassVar[str] = "target"
    reference: ClassVar[str] = REFERENCE
    recipe: ClassVar[Recipe] = _published(
        "mnist_DTPDRL.py",
        2.969e-5 / 0.06859,
        0.99,
        1.001e-8,
        "inverse",
        OptimizerSpec("adam", 2.012e-5, {"betas": (0.99, 0.999), "eps": 5.084e-8, "weight_decay": 5.385e-6}),
    )

    eta: float = option(
        0.06859,
        "step from the prediction to its target, along the mean loss's gradient",
        range=(0.001, 10.0),
        scale="log",
    )
    sigma: float = option(
        0.05688, "standard deviation of the noise that trains the feedback", range=(0.001, 0.5), scale="log"
    )
    warmup: int = option(6, "passes that train the feedback alone, before the first epoch", range=(0, 10))
    extra: int = option(1, "passes that train the feedback alone, at the end of each epoch", range=(0, 3))
    activation: Activation = option(
        "auto",
        "of the feedback: tanh, sigmoid, relu, elu, linear; 'auto': the range of what it gives",
        choices=("auto", *ACTIVATIONS),
    )
    lr_scale: float = option(
        1.0,
        "multiplies the learning rate of the feedback, the recipe's or your optimizer's",
        range=(0.1, 100.0),
        scale="log",
    )
    factory: Factory | None = option(
        None, "(value that it reads, value it leads back to) -> feedback network"
    )

    def __post_init__(self) -> None:
        for name, given in (("eta", self.eta), ("sigma", self.sigma), ("lr_scale", self.lr_scale)):
            if not given > 0:
                raise MethodError(f"{name}={given!r}: give a number above 0")
        for name, passes in (("warmup", self.warmup), ("extra", self.extra)):
            if passes < 0:
                raise MethodError(f"{name}={passes!r}: give a number of passes, 0 for none")
        if not callable(self.activation) and self.activation not in (*ACTIVATIONS, "auto"):
            known = nearest(str(self.activation), [*ACTIVATIONS, "auto"])
            raise MethodError(f"activation={self.activation!r}; {known}")

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse modules to which nothing comes back."""
        yield from unreached(ir)

    @property
    def maker(self) -> InverseMaker:
        """What builds the feedback networks: biases only where they do not cancel."""
        return InverseMaker(self.activation, self.factory, init="xavier", biased=False)

    def feedback(self) -> Pass:
        """Return the pass that adds the feedback: an inverse of each layer."""
        return Inverses(self.lr_scale, self.maker, last=True)

    def passes(self) -> Sequence[Pass]:
        """Return the feedback, what it learns from, the targets, and the phases."""
        return (
            self.feedback(),
            DifferenceReconstruction(self.sigma),
            OutputTargets(self.eta),
            LentGradients(),
            Turns("batch", self.warmup, self.extra),
        )


_OF = DTPDRL.__dataclass_fields__


@dataclass(frozen=True)
class DDTPLinear(DTPDRL):
    """Direct difference target propagation: a linear map leads from the output back to each module.

    As `dtp-drl`, but the target of a module's output h is h + Q (target of the prediction - prediction), so
    all modules update at once when the output has its target. `<module>.feedback` trains Q alone; its optimum
    is the damped pseudo-inverse of what lies between.
    """

    recipe: ClassVar[Recipe] = _published(
        "mnist_DDTPlinear.py",
        2.035e-5 / 0.06097,
        0.999,
        1.255e-8,
        "feedback",
        OptimizerSpec("adam", 1.638e-4, {"betas": (0.999, 0.999), "eps": 2.838e-4, "weight_decay": 5.836e-7}),
    )
    eta: float = option(0.06097, **_OF["eta"].metadata)
    sigma: float = option(0.09075, **_OF["sigma"].metadata)
    activation: Activation = option("linear", **_OF["activation"].metadata)

    def feedback(self) -> Pass:
        """Return the pass that adds the feedback: a map from the prediction to each module."""
        return DirectReturns(self.lr_scale, self.maker)


@dataclass(frozen=True)
class DDTPRHL(DDTPLinear):
    """Direct difference target propagation through a random hidden layer that all modules share.

    As `ddtp-linear`, but a module's map reads tanh(R a + r) of the prediction a, with R and r random, shared
    and never trained, and ends in the range of what it leads to. That of the last hidden module reads a.
    """

    recipe: ClassVar[Recipe] = _published(
        "mnist_DDTPRHL.py",
        2.805e-5 / 0.04352,
        0.99,
        3.984e-8,
        "feedback",
        OptimizerSpec("adam", 3.024e-4, {"betas": (0.9, 0.999), "eps": 3.403e-6, "weight_decay": 1.621e-3}),
    )
    eta: float = option(0.04352, **_OF["eta"].metadata)
    sigma: float = option(0.04162, **_OF["sigma"].metadata)
    activation: Activation = option("auto", **_OF["activation"].metadata)
    hidden: int = option(1024, "width of the random layer", range=(64, 4096), scale="log")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise MethodError(f"hidden={self.hidden!r}: give a width of at least 1")

    def feedback(self) -> Pass:
        """Return the pass that adds the feedback: maps that read the random layer."""
        return DirectReturns(self.lr_scale, self.maker, self.hidden)
