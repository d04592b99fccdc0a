"""`ss-usf`, `ss-brsf`, `ss-frsf`: feedback that shares the signs of the weights, and not their sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from locc.ir import TrainingGraph, owned_tensor
from locc.nn import feedback_call
from locc.rewrite import GradientChain, Method, OutputLoss, Pass, Recipe, has_norms
from locc_passes.feedback.layers import LAYERS, FeedbackLayers, FeedbackMatrix, feedback_layer

ALIKE, REDRAWN, DRAWN = "alike", "redrawn", "drawn"


def signed_layer(x: Tensor, layer: nn.Module, size: Tensor | float) -> Tensor:
    """Call `layer` on `x`; the gradient to `x` runs through size * sign(weight), as the weight is now."""
    with parametrize.cached() if parametrize.is_parametrized(layer) else nullcontext():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return feedback_call(layer, x, weight.detach().sign() * size)


SIGNED: Mapping[object, Callable[..., Tensor]] = {feedback_layer: signed_layer}
"""A product with a feedback matrix of its own -> the product whose feedback has the signs of its weight."""


def sizes(x: Tensor, shape: Sequence[int], scale: float, normal: bool) -> Tensor:
    """Draw sizes of at least 0 on the device of `x`: |N(0, scale^2)|, or U(0, scale)."""
    like = x.new_empty(tuple(shape))
    return scale * (torch.randn_like(like).abs() if normal else torch.rand_like(like))


@dataclass(frozen=True)
class SignSymmetry(Pass):
    """Puts B = M * sign(W), with W as it is in each step, in the place of every fixed matrix.

    M is s everywhere ("alike"), or drawn once ("drawn") or in every step ("redrawn"), from U(0, s) for linear
    layers and |N(0, s^2)| for convolutions. s is 1 / sqrt(fan in) of a linear layer; of a convolution
    sqrt(2 / (k C)), k the size of its kernel, C its output channels in each group. Calls of one weight
    share one M. Runs after `FeedbackLayers`.
    """

    sizes: str = ALIKE

    def rewrite(self, ir: TrainingGraph) -> None:
        """Replace the reads of the matrices, and the products that read them."""
        unread = set[str]()
        for matrix in _matrices(ir):
            name = str(matrix.target).removesuffix(".matrix").removeprefix("aux.")
            held = owned_tensor(ir.root, str(matrix.target))
            assert isinstance(held, Tensor)
            uses = list(matrix.users)
            normal = held.dim() > 2
            scale = max(_scale(ir.root, use, held) for use in uses)
            for use in uses:
                use.target = SIGNED[use.target]
                use.meta["made_by"] = self.label
            if self.sizes == DRAWN:
                held.copy_(sizes(held, held.shape, scale, normal))
                continue
            size: fx.Node | float = scale
            if self.sizes == REDRAWN:
                first, owner = uses[0], matrix.meta["owner"]
                size = ir.emit(owner, sizes, first.args[0], tuple(held.shape), scale, normal, role="sizes")
                first.prepend(size)
            for use in uses:
                use.args = tuple(size if a is matrix else a for a in use.args)
            ir.graph.erase_node(matrix)
            unread.add(name)
        for name in unread:  # the modules that share a frozen weight have read one matrix
            del ir.root.aux[name]

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """No product has kept a feedback matrix without signs."""
        for matrix in _matrices(ir):
            yield from (f"'{u.name}' reads '{matrix.target}'" for u in matrix.users if u.target in SIGNED)


def _matrices(ir: TrainingGraph) -> list[fx.Node]:
    reads = [n for n in ir.graph.nodes if n.op == "get_attr" and str(n.target).endswith(".matrix")]
    return [
        n
        for n in reads
        if isinstance(owned_tensor(ir.root, str(n.target).removesuffix(".matrix")), FeedbackMatrix)
    ]


def _scale(root: nn.Module, use: fx.Node, held: Tensor) -> float:
    """Return s for one product, whose feedback is of the shape of `held`."""
    if held.dim() == 2:
        return 1 / math.sqrt(held.shape[1])
    layer = root.get_submodule(str(use.meta["stands_for"][1]))
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return math.sqrt(2 / (math.prod(layer.kernel_size) * layer.out_channels / layer.groups))


@dataclass(frozen=True)
class StrictNorms(Pass):
    """Rescales, after each update, every weight to the norm that it has at the start."""

    def rewrite(self, ir: TrainingGraph) -> None:
        """Say so of every owner."""
        for owner in list(ir.owners):
            ir.keep_norms(owner)


@dataclass(frozen=True)
class UniformSigns(Method):
    """Sign-symmetric feedback, uniform: errors go back through the signs of the weights, all of one size.

    As `fa`, with B = s * sign(W): the signs are those of the weights in each step, s is fixed for each layer.
    The error at the output, and the Jacobians of nonlinearities, normalisation and pooling, are exact.
    """

    family: ClassVar[str] = "feedback"
    reference: ClassVar[str] = "Liao, Leibo & Poggio 2016, How important is weight symmetry in backprop"
    recipe: ClassVar[Recipe] = Recipe()
    opens: ClassVar[tuple[type[nn.Module], ...]] = LAYERS
    sizes: ClassVar[str] = ALIKE

    normalize: bool = field(
        default=False,
        metadata={
            "help": "strict normalisation: each update leaves a weight at its initial norm (Moskovitz, "
            "Litwin-Kumar & Abbott 2018)"
        },
    )

    def passes(self) -> Sequence[Pass]:
        """Return the feedback layers and their signs, the loss and the chain."""
        norms = (StrictNorms(),) if self.normalize else ()
        return (FeedbackLayers(), SignSymmetry(self.sizes), OutputLoss(), GradientChain(), *norms)

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of networks without normalisation."""
        if len(ir.modules) > 1 and not has_norms(ir):
            yield (
                "the network has no normalisation, without which errors that go back through signs grow "
                "or vanish with depth; put an nn.BatchNorm before each nonlinearity"
            )


@dataclass(frozen=True)
class BatchwiseRandomSigns(UniformSigns):
    """Sign-symmetric feedback whose sizes are drawn anew for every batch.

    As `ss-usf`, with B = M * sign(W) and M at least 0.
    """

    sizes: ClassVar[str] = REDRAWN


@dataclass(frozen=True)
class FixedRandomSigns(UniformSigns):
    """Sign-symmetric feedback whose sizes are drawn once.

    As `ss-usf`, with B = M * sign(W) and M at least 0.
    """

    sizes: ClassVar[str] = DRAWN
