"""Builds auxiliary networks, locc's own and those of a user's factory, with errors that name the module."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from locc.errors import MethodError
from locc.ir import TensorSpec
from locc.nn import Factory, check_shapes


def build(make: Factory, owner: str, source: TensorSpec, result: TensorSpec) -> nn.Module:
    """Return `make(source, result)`, for a builder of `locc.nn`.

    Raises:
        MethodError: the builder refuses these shapes; the message names the module `owner`.
    """
    try:
        return make(source, result)
    except MethodError as error:
        raise MethodError(f"module '{owner}': {error}") from error


def build_custom(
    make: Factory, owner: str, source: TensorSpec, result: TensorSpec, what: str, *, check: bool = True
) -> nn.Module:
    """Return `make(source, result)`, for a factory that a user passes as an option of a method.

    Parameters take the dtype of `source`.

    Args:
        make: the factory.
        owner: name of the module that the network serves, for the messages.
        source: spec of what the network reads.
        result: spec of what it shall return; for a head or a synthesiser, that of the model's output.
        what: what the network is, for the messages ("head", "inverse").
        check: run it on fake tensors, and refuse one whose result has not the spec `result`.

    Raises:
        MethodError: no module, a lazy one, or (with `check`) one whose result does not fit `result`.
    """
    network = make(source, result)
    if not isinstance(network, nn.Module):
        found = type(network).__name__
        raise MethodError(f"{what} of module '{owner}': the factory returned a {found}, not a module")
    if any(is_lazy(p) for p in (*network.parameters(), *network.buffers())):
        raise MethodError(
            f"{what} of module '{owner}': the factory returned lazy parameters; size them from the "
            f"boundary {source}"
        )
    network = network.to(source.dtype)
    if check:
        check_shapes(network, (source,), result, f"{what} of module '{owner}'")
    return network
