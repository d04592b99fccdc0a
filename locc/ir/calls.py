"""The arguments of a node as the code that it calls gets them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn


def given(value: Any, value_of: Callable[[fx.Node], Any]) -> Any:
    """Return (part of) a node's arguments with values for nodes, in lists and dicts of their own.

    `fx.map_arg` gives lists that refuse to be changed, and a module may change a list that it is given.
    """
    if isinstance(value, fx.Node):
        return value_of(value)
    if isinstance(value, list):
        return [given(v, value_of) for v in value]
    if isinstance(value, dict):
        return {k: given(v, value_of) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(given(v, value_of) for v in (value.start, value.stop, value.step)))
    if type(value) is tuple:
        return tuple(given(v, value_of) for v in value)
    return fx.map_arg(value, value_of)


def is_size(node: fx.Node) -> bool:
    """Whether a node is made of the sizes of values that have a spec: `x.size(0)`, `x.shape[1] // 2`."""
    sources = node.all_input_nodes
    if (node.op, node.target) == ("call_method", "size") or (
        node.target is getattr and node.args[1] == "shape"
    ):
        return sources[0].meta.get("spec") is not None
    return node.op == "call_function" and bool(sources) and all(map(is_size, sources))


def size_of(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """Return a size, for the values that it `is_size` of."""

    def find(n: fx.Node) -> Any:
        return size_of(n, value_of) if is_size(n) else value_of(n)

    args = given(node.args, find)
    return args[0].size(*args[1:]) if node.op == "call_method" else node.target(*args)  # type: ignore[operator]


class Interpreter(fx.Interpreter):
    """Runs a graph node by node, as its generated code would."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node."""
        return given(n.args, self.env.__getitem__), given(n.kwargs, self.env.__getitem__)


class Switched(nn.Module):
    """A function with an argument `training`, which is off while the owner of its call rests.

    That is what `F.dropout(x, p, self.training)` is for the module which calls it, as a layer is by its mode.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.__name__ = self.__qualname__ = function.__name__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, with its own arguments or not in training."""
        if self.training:
            return self.function(*args, **kwargs)
        given = inspect.signature(self.function).bind(*args, **kwargs)
        return self.function(**{**given.arguments, "training": False})
