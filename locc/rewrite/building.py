"""Builds auxiliary networks, locc's own and those of a user's factory, with errors that name the module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from locc.errors import MethodError, nearest
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


Given = Callable[..., Any] | Mapping[str, Any]
"""What a user gives for a part of a method: a factory, or by module a factory or the part itself."""


def given_for(given: Given, owner: str, source: TensorSpec, result: TensorSpec, what: str) -> Any:
    """Return what a user has given for a part of a module: out of a dict by module, made by a factory.

    A factory takes `(source, result)`, or with a third argument that has no default the module's name too.

    Args:
        given: the factory, or a dict by module of factories, or of the parts themselves.
        owner: the module's name.
        source: spec of what the part reads.
        result: spec of what it shall return, or is for.
        what: the part, for the messages ("head", "inverse").

    Raises:
        MethodError: a dict lacks the module; a network is given where each module needs its own; the factory
            takes other arguments, or raises.
    """
    if isinstance(given, Mapping):
        if owner not in given:
            raise MethodError(
                f"{what} of module '{owner}': the dict has none for it; {nearest(owner, map(str, given))}"
            )
        given = given[owner]
        if isinstance(given, nn.Module) or not callable(given):
            return given
    elif isinstance(given, nn.Module):
        raise MethodError(
            f"{what} of module '{owner}': a network was given, and each module needs its own; give a factory "
            f"(source spec, result spec) -> network, or a dict by module, {{'{owner}': network}}"
        )
    elif not callable(given):
        raise MethodError(
            f"{what} of module '{owner}': found {type(given).__name__}; give a factory (source spec, result "
            "spec) -> network, or a dict by module"
        )
    try:
        return given(*_arguments(given, owner, source, result, what))
    except MethodError:
        raise
    except Exception as error:
        raise MethodError(
            f"{what} of module '{owner}': the factory raised {type(error).__name__}: {error} when called "
            f"with ({source}, {result})"
        ) from error


def _arguments(
    make: Callable[..., Any], owner: str, source: TensorSpec, result: TensorSpec, what: str
) -> tuple[Any, ...]:
    """Return the arguments with which a factory wants to be called."""
    try:
        signature = inspect.signature(make)
    except ValueError:  # some callables written in C have none
        return source, result
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature.parameters.values() if p.kind in positional and p.default is p.empty]
    arguments = (source, result, owner)[: 3 if len(needed) == 3 else 2]
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise MethodError(
            f"{what} of module '{owner}': the factory takes {signature}, and it is called with (source spec, "
            "result spec), or with the module's name as a third argument"
        ) from error
    return arguments


def build_custom(
    make: Given, owner: str, source: TensorSpec, result: TensorSpec, what: str, *, check: bool = True
) -> nn.Module:
    """Return the network that a user gives as an option of a method, see `given_for`.

    Parameters take the dtype of `source`.

    Args:
        make: the factory, or a dict by module.
        owner: name of the module that the network serves, for the messages.
        source: spec of what the network reads.
        result: spec of what it shall return; for a head or a synthesiser, that of the model's output.
        what: what the network is, for the messages ("head", "inverse").
        check: run it on fake tensors, and refuse one whose result has not the spec `result`.

    Raises:
        MethodError: no module, a lazy one, or (with `check`) one whose result does not fit `result`.
    """
    network = given_for(make, owner, source, result, what)
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
