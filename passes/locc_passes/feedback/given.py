"""Feedback matrices that a user brings."""

from __future__ import annotations

from torch import Tensor

from locc.errors import MethodError
from locc.ir import TensorSpec
from locc.rewrite import Given, given_for


def given_matrix(
    given: Given,
    name: str,
    specs: tuple[TensorSpec, TensorSpec],
    like: Tensor,
    *others: tuple[int, ...],
) -> Tensor:
    """Return the user's matrix of a module or layer, with the dtype and device of the one that it replaces.

    Args:
        given: a dict by name of tensors, or a factory (spec, spec[, name]) -> tensor.
        name: of the module or layer.
        specs: what the factory takes.
        like: the matrix of the method's own.
        *others: shapes beside that of `like` that the matrix may have.

    Raises:
        MethodError: the dict lacks the name, the factory fails, or what it gives is no tensor of the shape.
    """
    found, wanted = given_for(given, name, *specs, "feedback"), tuple(like.shape)
    if not isinstance(found, Tensor) or tuple(found.shape) not in (wanted, *others):
        text = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise MethodError(f"feedback of module '{name}': give a tensor of shape {wanted}; found {text}")
    return found.detach().clone().to(like)
