"""Labels as vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from locc.errors import MethodError

IGNORE_INDEX = -100


def one_hot(
    target: Tensor,
    num_classes: int,
    *,
    dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return class ids of any shape [...] (per sample, token or pixel) as vectors [...,num_classes].

    Rows of `ignore_index`, like every id outside 0..num_classes-1, are zero: no data-dependent check, so
    no device sync. Class probabilities [...,num_classes] are returned as they are.

    Args:
        target: integer ids [...], or probabilities [...,num_classes].
        num_classes: the number of classes C.
        dtype: of the result; the default dtype unless given.
        ignore_index: the id that marks positions without a label.

    Raises:
        MethodError: a floating-point target without `num_classes` columns.
    """
    if target.is_floating_point():
        if target.dim() == 0 or target.shape[-1] != num_classes:
            raise MethodError(
                f"a target of shape {tuple(target.shape)} and dtype {target.dtype} is neither class ids nor "
                f"probabilities of {num_classes} classes; pass integer ids"
            )
        return target if dtype is None else target.to(dtype)
    classes = torch.arange(num_classes, device=target.device)
    rows = target.unsqueeze(-1)
    hot = (rows == classes) & (rows != ignore_index)
    return hot.to(torch.get_default_dtype() if dtype is None else dtype)
