"""`ss-usf`, `ss-brsf`, `ss-frsf`: feedback that shares the signs of the weights, and not their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from locc.ir import TrainingGraph, owned_tensor
from locc.nn import feedback_call
from locc.rewrite import GradientChain, Method, OutputLoss, Pass, Recipe, has_norms, option
from locc_passes.feedback.layers import FeedbackLayers, FeedbackMatrix, feedback_layer, opened
from locc_passes.feedback.products import FeedbackProduct, multiplied

ALIKE, REDRAWN, DRAWN = "alike", "redrawn", "drawn"


def signed_layer(x: Tensor, layer: nn.Module, size: Tensor | float) -> Tensor:
    """Call `layer` on `x`; the gradient to `x` runs through size * sign(weight), as the weight is now."""
    with parametrize.cached() if parametrize.is_parametrized(layer) else nullcontext():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return feedback_call(layer, x, weight.detach().sign() * size)


def signed(weight: Tensor, size: Tensor | float) -> Tensor:
    """Return size * sign(weight), as the weight is now."""
    return weight.detach().sign() * size


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
            uses, owner = list(matrix.users), str(matrix.meta["owner"])
            scale, normal = max(_scale(ir.root, use, held) for use in uses)
            size: fx.Node | float = scale
            if self.sizes == DRAWN:
                held.copy_(sizes(held, held.shape, scale, normal))
                size = matrix
            elif self.sizes == REDRAWN:
                like = _activation(uses[0])
                size = ir.emit(owner, sizes, like, tuple(held.shape), scale, normal, role="sizes")
                uses[0].prepend(size)
            for use in uses:
                use.meta["made_by"] = self.label
                if use.target is feedback_layer:
                    use.target = signed_layer
                    use.args = tuple(size if a is matrix else a for a in use.args)
                    continue
                weight = next(
                    w for w, m in zip(multiplied(use), _matrices_of(use), strict=True) if m is matrix
                )
                back = ir.emit(owner, signed, weight, size, role="feedback")
                use.prepend(back)
                use.replace_input_with(matrix, back)
            if self.sizes == DRAWN:
                continue
            ir.graph.erase_node(matrix)
            unread.add(name)
        for name in unread:  # the modules that share a frozen weight have read one matrix
            del ir.root.aux[name]

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """No product has kept a feedback matrix without signs."""
        for matrix in _matrices(ir):
            plain = [u for u in matrix.users if u.target not in (signed_layer, signed)]
            yield from (f"'{u.name}' reads '{matrix.target}'" for u in plain)


def _matrices_of(use: fx.Node) -> Sequence[object]:
    return use.args[1] if isinstance(use.args[1], tuple) else (use.args[1],)


def _activation(use: fx.Node) -> fx.Node:
    """Return an activation that a product reads."""
    known = multiplied(use)
    return next(n for n in use.all_input_nodes if n not in known and n.op != "get_attr")


def _matrices(ir: TrainingGraph) -> list[fx.Node]:
    reads = [n for n in ir.graph.nodes if n.op == "get_attr" and str(n.target).endswith(".matrix")]
    return [
        n
        for n in reads
        if isinstance(owned_tensor(ir.root, str(n.target).removesuffix(".matrix")), FeedbackMatrix)
    ]


def _scale(root: nn.Module, use: fx.Node, held: Tensor) -> tuple[float, bool]:
    """Return s for one product, whose feedback is of the shape of `held`, and whether it is a convolution."""
    product = use.target if isinstance(use.target, FeedbackProduct) else None
    if product is None and held.dim() > 2:
        layer = root.get_submodule(str(use.meta["stands_for"][1]))
        assert isinstance(layer, nn.modules.conv._ConvNd)
        return math.sqrt(2 / (math.prod(layer.kernel_size) * layer.out_channels / layer.groups)), True
    if product is None or not product.convolves:
        return 1 / math.sqrt(held.shape[-2 if product is not None and product.right else -1]), False
    channels = held.shape[1] if product.transposed else held.shape[0] / product.groups(use)
    return math.sqrt(2 / (math.prod(held.shape[2:]) * channels)), True


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
    sizes: ClassVar[str] = ALIKE

    normalize: bool = option(
        False,
        "strict normalisation: each update leaves a weight at its initial norm (Moskovitz, "
        "Litwin-Kumar & Abbott 2018)",
    )

    def opened(self, model: nn.Module, splits: Sequence[str]) -> Iterator[str]:
        """Yield the layers, and what multiplies with a weight of its own."""
        yield from opened(model)

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
