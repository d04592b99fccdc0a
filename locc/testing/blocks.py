"""What lies inside the modules of the kit's models: ordinary layers, and code that a prover may trip over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

Maker = Callable[[int, Tensor], nn.Module]
"""(width, a constant [width] that blocks may share) -> a block that keeps the shape of its input."""


class _Layer(nn.Module):
    """A linear layer, and what a subclass does with its output."""

    def __init__(self, width: int, constant: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self._after(self.linear(x))

    def _after(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class InPlace(_Layer):
    """Changes its own values in place."""

    def _after(self, y: Tensor) -> Tensor:
        y += 1
        y.mul_(0.5)
        return y.relu_()


class StraightThrough(_Layer):
    """Rounds forward, passes the gradient straight through."""

    def _after(self, y: Tensor) -> Tensor:
        hard = (y > 0).to(y.dtype)
        return hard + y - y.detach()


class Checkpointed(_Layer):
    """Recomputes its activations in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        found = checkpoint(self.linear, x, use_reentrant=False)
        assert isinstance(found, Tensor)
        return torch.tanh(found)


class RunningMean(_Layer):
    """Subtracts a moving average, a buffer of its own that every step changes."""

    def __init__(self, width: int, constant: Tensor) -> None:
        super().__init__(width, constant)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(width))

    def _after(self, y: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(y.flatten(0, -2).mean(0).to(self.mean), 0.1)
        return torch.tanh(y - self.mean)


class Constant(_Layer):
    """Scales by a constant that it shares, as one tensor, with the other blocks of its kind."""

    def __init__(self, width: int, constant: Tensor) -> None:
        super().__init__(width, constant)
        self.scale: Tensor
        self.register_buffer("scale", constant)

    def _after(self, y: Tensor) -> Tensor:
        return torch.tanh(y * self.scale)


class DetachedRead(_Layer):
    """Normalises by a detached statistic of its own output."""

    def _after(self, y: Tensor) -> Tensor:
        return y / (1 + y.detach().abs().mean())


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradients[0]


class CustomFunction(_Layer):
    """An activation with a backward pass of its own."""

    def _after(self, y: Tensor) -> Tensor:
        found: Tensor = _Cube.apply(torch.tanh(y))  # type: ignore[no-untyped-call]
        return found


class Twice(_Layer):
    """Applies its layer twice."""

    def _after(self, y: Tensor) -> Tensor:
        found: Tensor = self.linear(torch.tanh(y))
        return torch.tanh(found)


class Frozen(_Layer):
    """A second layer that nothing trains."""

    def __init__(self, width: int, constant: Tensor) -> None:
        super().__init__(width, constant)
        self.fixed = nn.Linear(width, width).requires_grad_(False)

    def _after(self, y: Tensor) -> Tensor:
        found: Tensor = self.fixed(torch.tanh(y))
        return found


class Adapted(_Layer):
    """A frozen layer with a trained one of rank one beside it."""

    def __init__(self, width: int, constant: Tensor) -> None:
        super().__init__(width, constant)
        self.linear.requires_grad_(False)
        self.down, self.up = nn.Linear(width, 1, bias=False), nn.Linear(1, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return torch.tanh(self.linear(x) + 2 * self.up(self.down(x)))


class Attention(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int, constant: Tensor) -> None:
        super().__init__()
        self.heads = 1 if width % 2 else 2
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _row(*layers: Callable[[int], nn.Module]) -> Maker:
    return lambda width, _: nn.Sequential(*(layer(width) for layer in layers))


def _linear(width: int) -> nn.Module:
    return nn.Linear(width, width)


def _conv(width: int) -> nn.Module:
    return nn.Conv2d(width, width, 3, padding=1)


def _normed(width: int) -> nn.Module:
    found: nn.Module = parametrizations.weight_norm(nn.Linear(width, width))
    return found


def _normed_by_hooks(width: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # many models still have it
        found: nn.Module = weight_norm(nn.Linear(width, width))
    return found


def _spectral(width: int) -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(width, width))


def _spectral_conv(width: int) -> nn.Module:
    return parametrizations.spectral_norm(_conv(width))


def _tanh(_: int) -> nn.Module:
    return nn.Tanh()


def _relu(_: int) -> nn.Module:
    return nn.ReLU()


def _relu_in_place(_: int) -> nn.Module:
    return nn.ReLU(inplace=True)


def _dropout(_: int) -> nn.Module:
    return nn.Dropout(0.3)


TOKENS: dict[str, Maker] = {
    "tanh": _row(_linear, _tanh),
    "attention": Attention,
    "layer_norm": _row(nn.LayerNorm, _linear, _relu),
    "dropout": _row(_linear, _dropout, _tanh),
    "in_place": InPlace,
    "checkpoint": Checkpointed,
    "running_mean": RunningMean,
    "weight_norm": _row(_normed, _tanh),
}

VECTORS: dict[str, Maker] = {
    "tanh": _row(_linear, _tanh),
    "relu": _row(_linear, _relu),
    "batch_norm": _row(_linear, nn.BatchNorm1d, _relu_in_place),
    "layer_norm": TOKENS["layer_norm"],
    "dropout": TOKENS["dropout"],
    "in_place": InPlace,
    "straight_through": StraightThrough,
    "checkpoint": Checkpointed,
    "running_mean": RunningMean,
    "constant": Constant,
    "detached_read": DetachedRead,
    "custom_function": CustomFunction,
    "twice": Twice,
    "frozen": Frozen,
    "adapter": Adapted,
    "weight_norm": TOKENS["weight_norm"],
    "weight_norm_hook": _row(_normed_by_hooks, _tanh),
    "spectral_norm": _row(_spectral, _tanh),
}

FEW: dict[str, Maker] = {kind: VECTORS[kind] for kind in ("tanh", "batch_norm", "dropout")}

CONVOLUTIONS: dict[str, Maker] = {
    "tanh": _row(_conv, _tanh),
    "relu": _row(_conv, _relu),
    "batch_norm": _row(_conv, nn.BatchNorm2d, _relu_in_place),
    "dropout": _row(_conv, lambda _: nn.Dropout2d(0.3), _tanh),
    "spectral_norm": _row(_spectral_conv, _tanh),
}

RECURRENT: dict[str, Maker] = {
    "gru": lambda width, _: nn.GRU(width, width, batch_first=True),
    "lstm": lambda width, _: nn.LSTM(width, width, batch_first=True),
}

INSIDE = {"attention": ("out",)}
"""Kinds of blocks that may be cut inside as well, and after which of their submodules."""
