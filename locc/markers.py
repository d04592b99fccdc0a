"""`locc.split`: a cut that is marked inside a forward."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def split(x: Tensor, name: str) -> Tensor:
    """Mark a split point after the value `x`; outside of locc it returns `x` as it is.

    Args:
        x: the value that leaves the module that ends here, of any shape.
        name: the name of that module, unique in the model.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(split, (x,), x, name)
    return x
