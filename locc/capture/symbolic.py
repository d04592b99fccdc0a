"""The first mechanism: `torch.fx` with proxies, where the opened code is plain enough for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc.capture.batch import Call
from locc.capture.calls import Calls
from locc.capture.eager import Run
from locc.capture.graphs import Trace, emit_output, placeholder_name, tidy
from locc.capture.patches import functions_patched
from locc.capture.source import user_line
from locc.capture.state import bindings, python_random_state, rewritten, torch_random_state
from locc.capture.targets import Applied, Region
from locc.capture.transforms import transforms_patched
from locc.errors import CaptureError
from locc.ir.captured import Root, strip
from locc.snapshot import preserved


def trace(root: Root, call: Call, opened: frozenset[str], training: bool, eager: Run) -> Trace:
    """Trace the opened modules with proxies.

    Raises:
        CaptureError: the opened code needs values, mutates tensors or changes ambient settings.
    """
    for seen in eager.calls:
        if seen.refilled or seen.resized:
            raise CaptureError(f"'{strip(seen.path)}' changes a list or dict that it is given")
    tracer = _Tracer(Calls(root, opened), call, eager)
    with (
        preserved(root),
        torch.enable_grad(),
        functions_patched(tracer.applied),
        transforms_patched(tracer.transformed),
    ):
        root.train(training)
        before, drawn, state = bindings(root), python_random_state(), torch_random_state()
        tracer.outside = Region.now()
        try:
            graph = tracer.trace(root)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"symbolic values do not suffice: {type(error).__name__}: {error}") from error
        if python_random_state() != drawn:
            raise CaptureError("the forward draws from Python's or NumPy's random numbers")
        if torch_random_state() != state:  # a decision by it would stay as it fell
            raise CaptureError("the forward draws random numbers without an input")
        for module, name, _ in rewritten(root, before):
            raise CaptureError(f"the forward sets '{strip(tracer.calls.paths[id(module)])}.{name}'")
    tidy(graph)
    return Trace(graph)


class _Proxy(fx.Proxy):
    """A proxy that refuses `+=`: on a plain one it would silently become `x = x + y`."""

    def _refuse(self, other: Any) -> Any:
        raise CaptureError(f"an in-place operator at {user_line()}")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = __imatmul__ = _refuse
    __ior__ = __iand__ = __ixor__ = __ifloordiv__ = __imod__ = __ilshift__ = __irshift__ = _refuse


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, calls: Calls, call: Call, eager: Run) -> None:
        super().__init__(autowrap_modules=(math,))
        self.calls, self.call, self.eager = calls, call, eager
        self.outside = Region.now()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        proxies = [self.create_proxy("placeholder", placeholder_name(n), (), {}) for n in self.call.names]

        def forward(root: Root, *tensors: Any) -> Any:
            inputs = self.call.inputs(list(tensors))
            result = root.model(*inputs.args, **inputs.kwargs)
            nodes = emit_output(self.graph, self.eager, result, self._node)
            return tuple(self.proxy(node) for node in nodes)

        return forward, [self.root, *proxies]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        if Region.now() != self.outside:
            raise CaptureError(f"a no_grad or autocast region at {user_line()}")
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        node.meta["stack"] = self.calls.now()
        line = user_line() if kind not in ("placeholder", "output") else None
        if line:
            node.meta["line"] = line
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            raise CaptureError(f"a module is passed as an argument at {user_line()}")
        # fx would store the constant on the user's model
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise CaptureError(f"a tensor made in the forward, at {user_line()}")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.calls.knows(m):
            return forward(*args, **kwargs)
        with self.calls.enter(m) as path:
            if self.calls.is_leaf(m):
                return self.create_proxy("call_module", path, args, kwargs)
            return forward(*args, **kwargs)

    def applied(self, function: type[torch.autograd.Function], original: Any, args: Any, kwargs: Any) -> Any:
        if function.__module__ == "torch.utils.checkpoint":
            raise CaptureError(f"activation checkpointing at {user_line()}")
        return self.create_proxy("call_function", Applied(function), args, kwargs)

    def transformed(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        raise CaptureError(f"torch.func.{name} at {user_line()}")

    def _node(self, value: Any) -> fx.Node | None:
        if isinstance(value, Tensor):
            value = self.create_proxy("get_attr", str(self.create_arg(value).target), (), {})
        return value.node if isinstance(value, fx.Proxy) else None
