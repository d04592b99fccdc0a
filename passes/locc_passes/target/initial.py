"""The initial weights of the networks that target propagation was made for."""

from __future__ import annotations

from torch import nn

from locc.errors import MethodError
from locc.nn import orthogonal_


def orthogonal_init(model: nn.Module) -> nn.Module:
    """Give every linear layer of a model unit singular values and zero biases, in place.

    The start of Lee et al. 2015, for MLPs; call it before `compile`.

    Raises:
        MethodError: the model has no linear layer.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise MethodError(f"orthogonal_init: {type(model).__name__} has no nn.Linear; it is meant for MLPs")
    for layer in layers:
        orthogonal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model
