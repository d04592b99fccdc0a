"""The user's loss, by name or as a callable."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function

from locc.errors import LoccError, nearest
from locc.ir.spec import BatchDim, Dim, TensorSpec

IGNORED = -100
"""The class index that cross-entropy leaves out."""

Dims = Sequence[int]
"""The dimensions of an output that may hold its classes, the preferred one first."""

ANY: Dims = (1, -1)
"""PyTorch's own [B, C, ...], or tokens [B, T, V]."""


def class_dim(shape: Sequence[int], target: Tensor, dims: Dims = ANY) -> int:
    """Return which dimension of an output holds the classes: the one that class indices lack.

    The first of `dims` where the target has none that fits (probabilities, say).
    """
    fitting = (d for d in dims if _without(shape, d) == tuple(target.shape))
    return next(fitting, dims[0]) % max(len(shape), 1)


def _without(shape: Sequence[Any], dim: int) -> tuple[Any, ...]:
    return tuple(n for i, n in enumerate(shape) if i != dim % len(shape))


def cross_entropy(output: Tensor, target: Tensor, dims: Dims = ANY) -> Tensor:
    """Mean softmax cross-entropy.

    Args:
        output: logits: [B, C], [B, C, ...] as PyTorch has them, or with the classes last: [B, T, V].
        target: class indices in the shape of `output` without its classes (-100 is ignored), which tells
            where these are; or probabilities in the shape of `output`.
        dims: where the classes may be; the first one wins where the target's shape fits several.
    """
    if not isinstance(output, Tensor):  # what stands for one has its say, as in PyTorch's losses
        return cast("Tensor", handle_torch_function(cross_entropy, (output,), output, target))
    dim = class_dim(output.shape, target, dims)
    if dim > 1:
        rows = target.flatten(0, dim - 1)
        return functional.cross_entropy(output.flatten(0, dim - 1), rows)
    return functional.cross_entropy(output, target)


def mse(output: Tensor, target: Tensor, dims: Dims = ANY) -> Tensor:
    """Mean squared error over all elements; class indices are compared as one-hot rows."""
    return functional.mse_loss(output, _rows(target, output, dims))


def bce(output: Tensor, target: Tensor, dims: Dims = ANY) -> Tensor:
    """Mean binary cross-entropy of logits; class indices are compared as one-hot rows."""
    return functional.binary_cross_entropy_with_logits(output, _rows(target, output, dims).to(output.dtype))


def l1(output: Tensor, target: Tensor, dims: Dims = ANY) -> Tensor:
    """Mean absolute error over all elements; class indices are compared as one-hot rows."""
    return functional.l1_loss(output, _rows(target, output, dims))


def _rows(target: Tensor, output: Tensor, dims: Dims) -> Tensor:
    if target.dim() == output.dim() - 1 and not target.is_floating_point():
        dim = class_dim(output.shape, target, dims)
        hot = functional.one_hot(target, output.shape[dim]).to(output.dtype)
        return hot.movedim(-1, dim)
    return target


NAMED: dict[str, Callable[[Tensor, Tensor, Dims], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "bce": bce,
    "l1": l1,
}

MODEL = "model"
"""The name of the loss that the model's forward computes and returns."""


class Loss:
    """The user's loss as the graph calls it: one function of (output, target) with a name to print.

    Attributes:
        name: of a loss of ours, else None.
        spec: of the tensor that it reads, once the model is captured.
        dims: the dimensions of that which may hold the classes, the preferred one first.
        path: by which keys it is found among several outputs of the model, where the user says.
        reads: what it is called there, and other predictions that local heads give.
    """

    def __init__(self, given: str | Callable[[Any, Any], Tensor]) -> None:
        if isinstance(given, str):
            if given not in (*NAMED, MODEL):
                known = (*NAMED, MODEL)
                raise LoccError(f"there is no loss '{given}'; {nearest(given, known)}, or pass a callable")
            self.name: str | None = given
        elif isinstance(given, type):
            raise LoccError(f"loss={given.__name__} is a class; give an instance, {given.__name__}()")
        elif callable(given):
            self.name = None
        else:
            raise LoccError(
                f"loss must be a name or a callable(output, target); found {type(given).__name__}"
            )
        self.given = given
        self.spec: TensorSpec | None = None
        self.dims: Dims = ANY
        self.path: tuple[Any, ...] = ()
        self.reads: tuple[str, ...] = ()
        self.__name__ = self.name or getattr(given, "__name__", type(given).__name__).replace(
            "<lambda>", "loss"
        )
        self.__qualname__ = self.__name__
        self.__module__ = "locc.losses"

    @classmethod
    def of(cls, function: Callable[[Any, Any], Tensor]) -> Loss:
        """Return the loss that a graph's loss function is."""
        return function if isinstance(function, cls) else cls(function)

    def on(
        self,
        spec: TensorSpec,
        tokens: bool = False,
        reads: tuple[str, ...] = (),
        path: tuple[Any, ...] = (),
    ) -> Loss:
        """Return the loss on an output.

        Args:
            spec: of the prediction.
            tokens: its three dimensions are [B, T, V].
            reads: what a head's predictions are called among several outputs.
            path: of the prediction among them, where the user has chosen it.

        A dimension that may vary holds no classes, so that a size which happens to equal another changes
        nothing.
        """
        rank = len(spec.shape)
        dims = (2,) if tokens and rank == 3 else tuple(dict.fromkeys((min(1, rank - 1), rank - 1)))
        found = copy.copy(self)
        found.spec, found.reads, found.path = spec, reads, path
        found.dims = tuple(d for d in dims if d >= 0 and isinstance(spec.shape[d], int)) or ANY
        return found

    def like(self, given: str | Callable[[Any, Any], Tensor]) -> Loss:
        """Return another loss, on the same output."""
        found = Loss(given)
        found.spec, found.dims = self.spec, self.dims
        return found

    @property
    def draws(self) -> bool:
        """Whether it may draw random numbers: our losses and those of PyTorch do not."""
        home = self.given if hasattr(self.given, "__name__") else type(self.given)
        pytorch = ("torch.nn.functional", "torch.nn.modules.loss")
        return self.name is None and getattr(home, "__module__", None) not in pytorch

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the loss, shape []."""
        if self.name == MODEL:
            value = own_loss(output)
        elif self.name is not None:
            value = NAMED[self.name](prediction_of(output, self.path), target, self.dims)
        else:
            assert callable(self.given)
            value = self.given(output, target)
        if not isinstance(value, Tensor) or value.dim() != 0:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise LoccError(f"loss '{self.__name__}' must return a 0-d tensor; found {found}")
        return value

    def reading(self) -> str:
        """Return how the loss reads output and target, for the certificate."""
        heads = f"; a head trains on the part of it that reads {_listed(self.reads)}" if self.reads else ""
        if self.name == MODEL:
            return f"the model's own, its output 'loss'{heads}"
        if self.name is None or self.spec is None:
            return f"{self.__name__}, a callable of (output, target){heads}"
        one = len(self.dims) == 1
        if one or (self._lacking(self.dims[0]) == self._lacking(self.dims[1])):
            return (
                f"{self.name} of {self.spec}, its classes in dimension {self.dims[0] % len(self.spec.shape)}"
            )
        each = (f"in dimension {d} for class indices {_text(self._lacking(d))}" for d in self.dims)
        return f"{self.name} of {self.spec}, its classes {', '.join(each)}"

    def misfit(self, target: Any, batch: int) -> str | None:
        """Return a sentence where a loss of ours cannot read a target for `batch` samples, otherwise None.

        Class indices are looked at on the CPU only: elsewhere that would wait for the device.
        """
        if self.name in (None, MODEL) or self.spec is None:
            return None
        if not isinstance(target, Tensor):
            return self._wanted(target)
        sizes = self.spec.concrete(batch)
        shape = tuple(n if _fixed(d) else None for n, d in zip(sizes, self.spec.shape, strict=True))
        whole = _alike(target.shape, shape)
        fitting = [d for d in self.dims if _alike(target.shape, _without(shape, d))]
        fits = bool(fitting) and not target.is_floating_point()
        if self.name == "cross_entropy":
            whole, fits = whole and target.is_floating_point(), fits and target.dtype in _INDICES
        elif fits and not whole:
            fits = target.dtype == torch.int64
        if whole or not fits:
            return None if whole else self._wanted(target)
        return self._outside(target, sizes[fitting[0]])

    def _wanted(self, target: Any) -> str:
        assert self.spec is not None
        kinds = [_text(self._lacking(d)) for d in self.dims]
        numbers = "probabilities" if self.name == "cross_entropy" else "numbers"
        return (
            f"loss '{self.name}' needs class indices {' or '.join(dict.fromkeys(kinds))} as torch.int64, or "
            f"{numbers} {_text(self.spec.shape)}, for the output {self.spec}; found {described(target)}. "
            "Nothing has changed; give such a target, or pass loss=callable(output, target)"
        )

    def _outside(self, target: Tensor, classes: int) -> str | None:
        if type(target) is not Tensor or target.device.type != "cpu":
            return None
        wrong = (target < 0) | (target >= classes)
        if self.name == "cross_entropy":
            wrong &= target != IGNORED
        if not wrong.any():
            return None
        left_out = f", or {IGNORED} where there is none" if self.name == "cross_entropy" else ""
        return (
            f"class index {int(target[wrong][0])} in the target: the output {self.spec} has {classes} "
            f"classes. Nothing has changed; give indices 0 to {classes - 1}{left_out}"
        )

    def _lacking(self, dim: int) -> tuple[Any, ...]:
        assert self.spec is not None
        return _without(self.spec.shape, dim)


def _fixed(dim: Dim) -> bool:
    """Whether the batch size alone tells a dimension."""
    return isinstance(dim, int) or (isinstance(dim, BatchDim) and isinstance(dim.scale, int))


def _alike(found: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(w in (n, None) for n, w in zip(found, wanted, strict=True))


_INDICES = (torch.int64, torch.uint8)
"""The dtypes of class indices that PyTorch's cross-entropy takes."""


def described(target: Any) -> str:
    """Return what a target is, as text."""
    if isinstance(target, Tensor):
        return f"a tensor of shape {_text(target.shape)} and dtype {target.dtype}"
    return type(target).__name__


def _text(shape: Sequence[Any]) -> str:
    return f"[{','.join(str(n) for n in shape)}]"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def prediction_of(output: Any, path: Sequence[Any] = ()) -> Tensor:
    """Return the tensor that a named loss or metric reads from a model's output.

    That is the output itself, what is found by `path`, its `logits`, or its only floating-point tensor.

    Raises:
        LoccError: the output holds several tensors and none is called `logits`.
    """
    for key in path if not isinstance(output, Tensor) else ():
        output = getattr(output, key) if isinstance(key, str) and hasattr(output, key) else output[key]
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
        f"a named loss needs one tensor, but the model returns {', '.join(items) or 'none'}; name it with "
        "prediction=, or pass loss=callable(output, target)"
    )


def own_loss(output: Any) -> Any:
    """Return the loss that a model's output holds under the name `loss`.

    Raises:
        LoccError: it holds none.
    """
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None:
        raise LoccError(
            "loss='model' takes the loss that the model's forward returns, and it returns no 'loss'; give "
            "the labels among the inputs (a dict with 'labels', as Hugging Face models take it)"
        )
    return found


def correct(loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor | None:
    """Return, for classification, a boolean for each target whether it is the arg max; otherwise None.

    Args:
        loss: tells where the classes are, where the shapes leave that open.
        output: what the model returns.
        target: class indices; -100 is left out.
    """
    try:
        scores = prediction_of(output, Loss.of(loss).path)
    except LoccError:
        return None
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() != scores.dim() - 1:
        return None
    dim = class_dim(scores.shape, target, Loss.of(loss).dims)
    classes = scores.argmax(dim)
    if classes.shape != target.shape:
        return None
    return (classes == target)[target != IGNORED]


def judged(loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
    """Return the loss, how many targets are met, and of how many (see `correct`): [3], in float64."""
    found = correct(loss, output, target)
    hits = (0.0, 0.0) if found is None else (float(found.sum()), float(found.numel()))
    return torch.tensor([float(loss(output, target)), *hits], dtype=torch.float64, device="cpu")


__all__ = [
    "MODEL",
    "NAMED",
    "Loss",
    "correct",
    "cross_entropy",
    "described",
    "judged",
    "mse",
    "prediction_of",
]
