"""`dtp` and `tp`: modules that move their output towards a target that learned inverses hand down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    OutputLoss,
    Pass,
    Recipe,
    has_norms,
    is_rectified,
    option,
    unreached,
)
from locc_passes.target.passes import ORDERS, Inverses, Reconstruction, Targets, Turns
from locc_passes.target.returns import returns

INITS = ("orthogonal", "pytorch")

_RMSPROP = {"alpha": 0.95, "eps": 0.0316, "momentum": 0.9, "centered": True}


@dataclass(frozen=True)
class DTP(Method):
    """Difference target propagation: each module descends the distance of its output to a target.

    The target of what the last module reads is one gradient step on the loss; below it, the difference that
    the next module's target makes to its inverse is added to the output. The last module trains on the loss.
    The inverse `<module>.inverse` trains alone on noisy activations; the first and the last module have none.

    `fit` makes two passes over the data in each epoch, first for the inverses, then for the modules
    (`order="batch"`: both in every batch). `step` outside of `fit` trains both. `sigma` is in units of the
    activations: lower it for activations far below 1. The objective's gradient is about 2 eta / B of
    backpropagation's for a batch of B: Adam, the default, rescales it; plain SGD needs a larger rate.
    Defaults are the paper's, but for the optimizers (`published` has the paper's, under which networks of
    ReLUs diverge) and the inverses' activation (there tanh, as in its networks). A parameter lent to a later
    module (`tied="owner"`) gets the gradient of the borrower's own objective.
    """

    family: ClassVar[str] = "target"
    reference: ClassVar[str] = "Lee, Zhang, Fischer & Bengio 2015, Difference target propagation"
    recipe: ClassVar[Recipe] = Recipe(source="locc's own, which trains networks of ReLUs as well")
    published: ClassVar[Recipe | None] = Recipe(
        OptimizerSpec("rmsprop", 0.0149, _RMSPROP),
        {"inverse": OptimizerSpec("rmsprop", 0.00501, _RMSPROP)},
        source="Lee et al. 2015, released code, whose stabiliser 0.001 is inside of the root; batches of 100",
        network="tanh units that start from orthogonal weights (locc_passes.target.initial.orthogonal_init)",
    )
    difference: ClassVar[bool] = True

    eta: float = option(
        0.3277,
        "step from the last hidden output to its target, along the mean loss's gradient",
        range=(0.01, 300.0),
        scale="log",
    )
    sigma: float = option(
        0.3598, "standard deviation of the noise that trains the inverses", range=(0.001, 1.0), scale="log"
    )
    order: str = option(
        "epoch", "'epoch': inverses and modules train in turns; 'batch': together", choices=ORDERS
    )
    activation: Activation = option(
        "auto",
        "of the inverses: tanh, sigmoid, relu, elu, linear; 'auto': the range of what they give",
        choices=("auto", *ACTIVATIONS),
    )
    init: str = option("orthogonal", "of the inverses: 'orthogonal' or 'pytorch'", choices=INITS)
    lr_scale: float = option(
        1.0,
        "multiplies the learning rate of the inverses, the recipe's or your optimizer's",
        range=(0.1, 10.0),
        scale="log",
    )
    factory: Factory | None = option(None, "(module's output, value it reads) -> inverse network")

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise MethodError(f"eta={self.eta!r}: give a step above 0")
        if not self.sigma > 0:
            raise MethodError(
                f"sigma={self.sigma!r}: give a deviation above 0; without noise no inverse is learned"
            )
        if not self.lr_scale > 0:
            raise MethodError(f"lr_scale={self.lr_scale!r}: give a factor above 0")
        for name, given, known in (("order", self.order, ORDERS), ("init", self.init, INITS)):
            if given not in known:
                raise MethodError(f"{name}={given!r}; {nearest(str(given), known)}")
        if not callable(self.activation) and self.activation not in (*ACTIVATIONS, "auto"):
            known_activations = nearest(str(self.activation), [*ACTIVATIONS, "auto"])
            raise MethodError(f"activation={self.activation!r}; {known_activations}")

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse modules to which nothing comes back."""
        yield from unreached(ir)

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of inverses whose result would have to end in a ReLU."""
        ended = [v for m in ir.modules for v in ir.crossing(m.name) if is_rectified(v, ir.root)]
        names = ", ".join(dict.fromkeys(f"'{back.module}'" for v in ended for back in returns(v)))
        if names and self.factory is None and not has_norms(ir):
            yield (
                f"the inverses of {names} have to give what a ReLU gave, and a ReLU has no inverse; use tanh "
                "in the place of the ReLU, or put an nn.BatchNorm before it"
            )

    def passes(self) -> Sequence[Pass]:
        """Return the loss, the inverses, the targets and the turns."""
        return (
            OutputLoss(),
            Inverses(self.lr_scale, InverseMaker(self.activation, self.factory, self.init)),
            Reconstruction(self.sigma),
            Targets(self.eta, self.difference),
            LentGradients(),
            Turns(self.order),
        )


@dataclass(frozen=True)
class TP(DTP):
    """Target propagation without the difference correction: a baseline, whose inverses' errors accumulate.

    As `dtp`, but the target of what a module reads is its inverse of its own target; where several modules
    read a value, the mean of what they propose. A target differs from the output by the inverse's error as
    well, so the step `eta` has to be larger than that error: under that of `dtp` modules learn the errors
    alone. The default is locc's own. A mean over positions (a language model's) makes gradients small: take
    eta=1e6 there, with Adam, which does not mind its size as plain SGD does.
    """

    reference: ClassVar[str] = (
        "Bengio 2014, How auto-encoders could provide credit assignment in deep networks"
    )
    published: ClassVar[Recipe | None] = None
    difference: ClassVar[bool] = False

    eta: float = option(
        1000.0,
        "step from the last hidden output to its target, along the mean loss's gradient",
        range=(1.0, 1e8),
        scale="log",
    )
