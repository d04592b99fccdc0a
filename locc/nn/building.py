"""What the builders share: layers by number of spatial dimensions, initial values, and the shape check."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from locc.errors import MethodError
from locc.ir.spec import SMALL, BatchDim, TensorSpec

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ADAPTIVE_POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}

MAX_WEIGHTS = 2**26
"""Largest dense weight (entries) that a builder makes without being told to: 256 MiB in float32."""


class Placement(TypedDict):
    """Where parameters are created."""

    device: torch.device | str | None
    dtype: torch.dtype


def placement(
    spec: TensorSpec,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **others: object,
) -> Placement:
    """Return the factory keywords of a network that reads `spec`: its dtype unless another is asked for."""
    return {"device": device, "dtype": spec.dtype if dtype is None else dtype}


def guard_weights(rows: int, columns: int, limit: int, what: str) -> None:
    """Raise MethodError if a dense [rows, columns] weight has more than `limit` entries."""
    if rows * columns > limit:
        raise MethodError(
            f"{what} needs a dense weight of {rows} x {columns} = {rows * columns} entries, over the limit "
            f"of {limit}; cut where the value is smaller, raise max_weights, or pass your own factory"
        )


def agree_on_rows(a: TensorSpec, b: TensorSpec) -> None:
    """Raise MethodError unless `a` and `b` have the same number of rows a sample in their batch dimension."""
    if [d for d in a.shape if isinstance(d, BatchDim)] != [d for d in b.shape if isinstance(d, BatchDim)]:
        raise MethodError(
            f"{a} and {b} do not have the same number of rows a sample, so no network leads from one to the "
            "other; cut where they agree or pass your own factory"
        )


def orthogonal_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill `weight` [n,m] with U V^T of the SVD of a uniform matrix: all its singular values are 1.

    Lee, Zhang, Fischer & Bengio, "Difference target propagation" (released code). Drawn in float64 on
    the CPU, so the same seed gives the same matrix on every device.
    """
    if weight.device.type == "meta":
        return weight
    draw = torch.rand(weight.shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
    u, _, vh = torch.linalg.svd(draw, full_matrices=False)
    with torch.no_grad():
        return weight.copy_(u @ vh)


def zero_(layer: nn.Module, *, bias: bool = True) -> None:
    """Set the weight of `layer`, and its bias unless told otherwise, to zero."""
    nn.init.zeros_(cast("Tensor", layer.weight))
    if bias and layer.bias is not None:
        nn.init.zeros_(cast("Tensor", layer.bias))


def check_shapes(network: nn.Module, inputs: tuple[TensorSpec, ...], result: TensorSpec, what: str) -> None:
    """Run `network` with a batch of 2 and raise unless it gives `result`; nothing of it changes.

    Where sizes may vary it runs at both sizes that capture has tried.

    A small one runs on zeros, which takes less time than PyTorch's shape rules; a large one on meta tensors.

    Raises:
        MethodError: the network fails on these shapes, or gives another one.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    read = sum(t.numel() for _, t in tensors) + sum(math.prod(spec.concrete(2)) for spec in inputs)
    asked = ", ".join(str(spec) for spec in inputs)
    for probe in (0, 1) if any(spec.free for spec in (*inputs, result)) else (0,):
        found = None
        if read <= SMALL:
            with suppress(Exception):  # no kernel for this dtype on the CPU, say: the shape rules decide
                found = _run(network, inputs, "cpu", probe)
        try:
            found = _run(network, inputs, "meta", probe) if found is None else found
        except (RuntimeError, ValueError, IndexError) as error:
            raise MethodError(
                f"{what} cannot serve {asked}{_sizes(inputs, probe)}: {error}; cut elsewhere, or pass your "
                "own factory"
            ) from error
        if tuple(found.shape) != result.concrete(2, probe):
            raise MethodError(
                f"{what} for {asked} gives shape {tuple(found.shape)} at batch 2{_sizes(inputs, probe)}, and "
                f"{result} was asked for; pass the layout, or your own factory"
            )


def _sizes(inputs: tuple[TensorSpec, ...], probe: int) -> str:
    free = {dim.name: dim.at(probe) for spec in inputs for dim in spec.free}
    varying = ", ".join(f"{name} = {size}" for name, size in free.items())
    return f" with {varying} (dynamic: it may vary)" if varying else ""


def _run(network: nn.Module, inputs: tuple[TensorSpec, ...], device: str, probe: int) -> Any:
    """Return what zeros give, in a batch of 2, with zeros for the parameters and buffers."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    state: dict[str, Any] = {name: torch.zeros_like(t, device=device) for name, t in tensors}
    floating = [t.dtype for t in state.values() if t.is_floating_point()]
    values = [torch.zeros(spec.concrete(2, probe), dtype=spec.dtype, device=device) for spec in inputs]
    if floating:  # autocast may bring the boundary to another precision than the parameters
        values = [v.to(floating[0]) if v.is_floating_point() else v for v in values]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return torch.func.functional_call(network, state, tuple(values))


def numel(spec: TensorSpec) -> int:
    """Return the number of features of one row of `spec`: the product of all but its batch dimension.

    Raises:
        MethodError: it varies.
    """
    if spec.free:
        raise MethodError(
            f"{spec} has a varying number of features ({', '.join(d.name for d in spec.free)}), and a "
            "dense layer needs a fixed one; cut elsewhere, or leave the dimension out of dynamic"
        )
    return math.prod(d for d in spec.shape if isinstance(d, int))
