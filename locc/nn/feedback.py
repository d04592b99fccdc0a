"""Layers whose backward runs through a fixed matrix, and the broadcast of the output error.

Lillicrap et al. 2016 (feedback alignment); Nøkland 2016 (direct feedback alignment). No custom autograd
function: those lose their backward in torch.export.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locc.errors import MethodError, nearest
from locc.ir.spec import BatchDim, TensorSpec
from locc.nn.building import numel
from locc.nn.layout import Layout, in_proportion, regrid, split_dim
from locc.nn.readout import Readout, plan_readout

Sizes = int | tuple[int, ...]

_CONV: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


def feedback_linear(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
    """F.linear whose input gradient is e @ feedback instead of e @ weight.

    The forward is bit-equal to F.linear and the weight and bias gradients are exact; `feedback` gets none.

    Args:
        x: [...,n].
        weight: [m,n].
        bias: [m] or None.
        feedback: B, in the shape of `weight`.
    """
    _same_shape(weight, feedback)
    return _through(x, F.linear(x.detach(), weight, bias), lambda z: F.linear(z, feedback.detach()))


def feedback_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    dims: int = 2,
    *,
    transposed: bool = False,
    output_padding: Sizes = 0,
) -> Tensor:
    """Convolution whose input gradient runs through the kernel `feedback` instead of `weight`.

    Args:
        x: [B,C,*space] with `dims` spatial dimensions.
        weight: [C',C/groups,*kernel], or [C,C'/groups,*kernel] if `transposed`.
        bias: [C'] or None.
        feedback: B, in the shape of `weight`.
        stride: as in F.conv2d.
        padding: as in F.conv2d; a string only if not `transposed`.
        dilation: as in F.conv2d.
        groups: as in F.conv2d.
        dims: 1, 2 or 3.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed convolution.

    Raises:
        MethodError: `dims` is not 1, 2 or 3, or `feedback` is not of the shape of `weight`.
    """
    if (dims, transposed) not in _CONV:
        raise MethodError(f"feedback convolutions have 1, 2 or 3 dimensions, not {dims}")
    _same_shape(weight, feedback)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = output_padding
    conv = _CONV[dims, transposed]
    y = conv(x.detach(), weight, bias, **options)
    return _through(x, y, lambda z: conv(z, feedback.detach(), None, **options))


def feedback_call(layer: nn.Module, x: Tensor, feedback: Tensor) -> Tensor:
    """Call `layer` on `x` with the input gradient through `feedback`.

    Serves nn.Linear and the convolutions, transposed ones and every padding mode included.

    Raises:
        MethodError: a layer of another kind.
    """
    if isinstance(layer, nn.Linear):
        return feedback_linear(x, layer.weight, layer.bias, feedback)
    if not isinstance(layer, nn.modules.conv._ConvNd):
        raise MethodError(
            f"feedback is defined for linear and convolution layers, not for {type(layer).__name__}; an "
            "embedding has no input gradient, and layers without a weight keep their own"
        )
    padding: Sizes | str = layer.padding
    if layer.padding_mode != "zeros":
        # Padding by reflection is no linear layer: its own gradient is exact.
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return feedback_conv(
        x,
        layer.weight,
        layer.bias,
        feedback,
        layer.stride,
        padding,
        layer.dilation,
        layer.groups,
        len(layer.kernel_size),
        transposed=layer.transposed,
        output_padding=layer.output_padding,
    )


_LAWS: dict[str, Callable[..., Tensor]] = {
    "kaiming_uniform": lambda w, generator: nn.init.kaiming_uniform_(w, a=math.sqrt(5), generator=generator),
    "kaiming_normal": lambda w, generator: nn.init.kaiming_normal_(w, generator=generator),
    "xavier_uniform": lambda w, generator: nn.init.xavier_uniform_(w, generator=generator),
    "xavier_normal": lambda w, generator: nn.init.xavier_normal_(w, generator=generator),
}


def draw_feedback(
    weight: Tensor, init: str = "kaiming_uniform", generator: torch.Generator | None = None
) -> Tensor:
    """Draw a feedback matrix of the shape, dtype and device of `weight`, without a gradient.

    Args:
        weight: of the layer.
        init: "kaiming_uniform" (that of nn.Linear and nn.Conv: U(+-1/sqrt(fan_in))), "kaiming_normal",
            "xavier_uniform" or "xavier_normal".
        generator: the source of randomness; PyTorch's own on the CPU unless given.

    Raises:
        MethodError: an unknown law, or a weight with fewer than two dimensions.
    """
    if init not in _LAWS:
        raise MethodError(f"feedback law {init!r} is unknown; {nearest(init, _LAWS)}")
    if weight.dim() < 2:
        raise MethodError(f"a weight of shape {tuple(weight.shape)} has no input gradient to replace")
    draw = _draw(tuple(weight.shape), weight.dtype, generator)
    return _LAWS[init](draw, generator=generator).to(weight.device)


class BroadcastFeedback(nn.Module):
    """The direct feedback of one boundary: the output error to a value of the boundary's shape.

    delta = e B^T with B ~ U(+-1/sqrt(n)), drawn once and kept in a buffer.
      * One error per sample: a flat value or an image has a full matrix, n its size; every position of a
        sequence gets e B^T / T, as through a mean over positions, and n = D.
      * One error per position: B acts at each, and n = D. Where the numbers of positions differ the errors
        are resampled with their sum kept, and a class token gets none. A flat value gets their sum.
    """

    matrix: Tensor

    def __init__(
        self,
        spec: TensorSpec,
        output: TensorSpec,
        *,
        layout: Layout | str | None = None,
        output_layout: Layout | str | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.readout = plan_readout(spec, output, layout, output_layout)
        draw = draw_broadcast(spec, self.readout, generator).to(spec.dtype if dtype is None else dtype)
        self.register_buffer("matrix", draw if device is None else draw.to(device))

    def forward(self, e: Tensor) -> Tensor:
        """Map the error `e`, in the shape of the output, to the boundary's shape."""
        return _broadcast(e, self.matrix, self.spec, self.readout)


def draw_broadcast(spec: TensorSpec, plan: Readout, generator: torch.Generator | None = None) -> Tensor:
    """Draw B [n,C] ~ U(+-1/sqrt(n)) on the CPU for the boundary `spec`, with n as in `BroadcastFeedback`."""
    full = not plan.target and plan.layout.kind != "sequence"
    n = numel(spec) if full else plan.in_features
    classes = plan.out_features // (1 if plan.per_position else math.prod(plan.target))
    bound = 1 / math.sqrt(n)
    return _draw((n, classes), spec.dtype, generator).uniform_(-bound, bound, generator=generator)


def broadcast_feedback(
    e: Tensor,
    matrix: Tensor,
    spec: TensorSpec,
    output: TensorSpec | None = None,
    layout: Layout | str | None = None,
) -> Tensor:
    """Return delta = e B^T in the shape of the boundary, as `BroadcastFeedback` does.

    Args:
        e: the error at the model's output, [B,C] or with positions.
        matrix: B [n,C]; n is D, or the whole size of the boundary with one error per sample.
        spec: the boundary.
        output: of the model; read from the shape of `e` unless given.
        layout: of the boundary, where `guess_layout` guesses wrong.

    Raises:
        MethodError: `matrix` fits neither.
    """
    if output is None:
        batch = 1 if spec.batch_dim == 1 and e.dim() == 3 else 0
        output = TensorSpec(
            tuple(BatchDim() if i == batch else int(n) for i, n in enumerate(e.shape)), e.dtype
        )
    return _broadcast(e, matrix, spec, plan_readout(spec, output, layout))


def _broadcast(e: Tensor, matrix: Tensor, spec: TensorSpec, plan: Readout) -> Tensor:
    errors = plan.rows_of(e)
    layout, width = plan.layout, plan.in_features
    sizes = (plan.folded_in,) if plan.folded_in > 1 else layout.sizes(spec)
    if plan.target and layout.kind == "flat":
        errors = errors.flatten(1, -2).sum(1)
    elif plan.target:
        if plan.source != plan.target:
            scale = math.prod(plan.target) / math.prod(plan.source)
            maps = errors.movedim(-1, 1)
            errors = regrid(maps, in_proportion(maps, plan.target, plan.source)).movedim(1, -1) * scale
        if plan.drop_class_token:
            errors = F.pad(errors, (0, 0, 1, 0))
    rows = errors @ matrix.t()
    if errors.dim() > 2:
        delta = layout.from_last(_of_width(rows, width, spec))
    elif layout.kind == "flat":
        delta = _of_width(rows, width, spec)
    elif matrix.shape[0] == width * math.prod(sizes):
        # Which unit a random row belongs to is arbitrary, but it must not depend on the batch.
        delta = layout.from_last(split_dim(rows, 1, (*sizes, width)))
    else:
        share = _of_width(rows, width, spec) / math.prod(sizes)
        share = share.view(share.shape[0], *[1] * len(sizes), width)
        delta = layout.from_last(share.expand(-1, *sizes, -1))
    return delta.flatten(0, 1) if plan.folded_in > 1 else delta


def _of_width(rows: Tensor, width: int, spec: TensorSpec) -> Tensor:
    if rows.shape[-1] != width:
        raise MethodError(f"a feedback matrix of {rows.shape[-1]} rows does not fit the boundary {spec}")
    return rows


def _through(x: Tensor, y: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `y`, with the gradient of `back` to `x`."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return y
    # x - x.detach() is zero before the map, so an overflow in B x cannot reach the forward value.
    return y + back(x - x.detach())


def _same_shape(weight: Tensor, feedback: Tensor) -> None:
    if weight.shape != feedback.shape:
        raise MethodError(
            f"a feedback matrix has the shape of its weight, {tuple(weight.shape)}; this one has "
            f"{tuple(feedback.shape)}"
        )


def _draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    # On the CPU unless the generator lives elsewhere: one seed, one matrix, whatever the device.
    device = torch.device("cpu") if generator is None else generator.device
    return torch.empty(shape, dtype=dtype, device=device)
