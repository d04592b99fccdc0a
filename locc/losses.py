"""The user's loss, by name or as a callable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from locc.errors import LoccError, nearest


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean softmax cross-entropy.

    Args:
        output: logits [B, C], [B, T, V] (tokens) or [B, C, H, W] (pixels).
        target: class indices of shape [B], [B, T] or [B, H, W] (-100 is ignored), or probabilities in the
            shape of `output`.
    """
    if output.dim() == 3 and target.dim() == 2:
        return functional.cross_entropy(output.flatten(0, 1), target.flatten())
    return functional.cross_entropy(output, target)


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements; class indices [B] are compared as one-hot rows."""
    return functional.mse_loss(output, _rows(target, output))


def bce(output: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits; class indices [B] are compared as one-hot rows."""
    return functional.binary_cross_entropy_with_logits(output, _rows(target, output).to(output.dtype))


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over all elements; class indices [B] are compared as one-hot rows."""
    return functional.l1_loss(output, _rows(target, output))


def _rows(target: Tensor, output: Tensor) -> Tensor:
    if target.dim() == output.dim() - 1 and not target.is_floating_point():
        return functional.one_hot(target, output.shape[-1]).to(output.dtype)
    return target


NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "bce": bce,
    "l1": l1,
}


class Loss:
    """The user's loss as the graph calls it: one function of (output, target) with a name to print."""

    def __init__(self, given: str | Callable[[Any, Any], Tensor]) -> None:
        if isinstance(given, str):
            if given not in NAMED:
                raise LoccError(f"there is no loss '{given}'; {nearest(given, NAMED)}, or pass a callable")
            self.function: Callable[[Any, Any], Tensor] = NAMED[given]
            self.name: str | None = given
        elif callable(given):
            self.function, self.name = given, None
        else:
            raise LoccError(
                f"loss must be a name or a callable(output, target); found {type(given).__name__}"
            )
        self.__name__ = self.name or getattr(given, "__name__", type(given).__name__).replace(
            "<lambda>", "loss"
        )
        self.__qualname__ = self.__name__
        self.__module__ = "locc.losses"

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the loss, shape []."""
        if self.name is not None:
            output = prediction_of(output)
        value = self.function(output, target)
        if not isinstance(value, Tensor) or value.dim() != 0:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise LoccError(f"loss '{self.__name__}' must return a 0-d tensor; found {found}")
        return value


def prediction_of(output: Any) -> Tensor:
    """Return the tensor that a named loss or metric reads from a model's output.

    That is the output itself, its `logits`, or its only floating-point tensor.

    Raises:
        LoccError: the output holds several tensors and none is called `logits`.
    """
    if isinstance(output, Tensor):
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        items = {str(k): v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}
    else:
        items = {str(i): v for i, v in enumerate(output) if isinstance(v, Tensor) and v.is_floating_point()}
    if "logits" in items:
        return items["logits"]
    if len(items) == 1:
        return next(iter(items.values()))
    raise LoccError(
        f"a named loss needs one tensor, but the model returns {', '.join(items) or 'none'}; pass "
        "loss=callable(output, target)"
    )


def correct(output: Any, target: Any) -> Tensor | None:
    """Return, for classification, a boolean for each target whether it is the arg max; otherwise None."""
    try:
        scores = prediction_of(output)
    except LoccError:
        return None
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() != scores.dim() - 1:
        return None
    classes = scores.argmax(dim=-1 if target.shape == scores.shape[:-1] else 1)
    if classes.shape != target.shape:
        return None
    return (classes == target)[target != -100]


__all__ = ["NAMED", "Loss", "correct", "cross_entropy", "mse", "prediction_of"]
