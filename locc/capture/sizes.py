"""Symbolic sizes: how they are written into the graph, and the conditions that the code puts on them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from locc.capture.source import user_code
from locc.errors import CaptureError
from locc.ir.captured import BatchGuard
from locc.ir.spec import Dim

Emit = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], fx.Node]
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_symbolic(value: Any) -> bool:
    """Whether a number depends on the batch size."""
    return isinstance(value, _SYMBOLIC)


class Sizes:
    """The symbol of the batch size, and how its expressions become nodes."""

    def __init__(self, batch: int | None) -> None:
        # a shape that depends on data has no spec, so such an op must fail
        self.env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.symbol: Any = None
        self.size: Any = batch
        self.conditions: list[tuple[Any, str]] = []
        self._sources: list[tuple[Tensor, int]] = []
        if batch is not None:
            from torch._dynamo.source import ConstantSource

            source = ConstantSource("B")
            self.symbol = self.env.create_symbol(batch, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            self.size = self.env.create_symintnode(self.symbol, hint=batch, source=source)

    def of(self, dim: Dim) -> Any:
        """Return the (symbolic) size of a dimension."""
        if isinstance(dim, int):
            return dim
        return self.size * dim.scale + dim.offset

    def seen(self, tensor: Tensor) -> None:
        """Remember that the user's code read the sizes of `tensor`."""
        for i, n in enumerate(tensor.shape):
            if is_symbolic(n):
                self._sources.append((tensor, i))

    def node(
        self, value: Any, near: Sequence[Tensor], node_of: Callable[[Tensor], fx.Node], emit: Emit
    ) -> Any:
        """Return a number or node that computes `value` from a size of a tensor in `near`, if it can."""
        expression = sympy.sympify(value.node.expr)
        if not expression.free_symbols:
            return type(value.node.hint)(expression)
        known = [(t, i) for t in near for i, n in enumerate(t.shape) if is_symbolic(n)]
        candidates = [*known, *reversed(self._sources)]
        for tensor, i in candidates:
            if _expression(tensor.shape[i]) == expression:
                return emit("call_method", "size", (node_of(tensor), i), {})
        for tensor, i in candidates:
            if _expression(tensor.shape[i]) == self.symbol:
                batch = emit("call_method", "size", (node_of(tensor), i), {})
                return self._write(expression, batch, emit)
        raise CaptureError(f"cannot compute the size {self.text(expression)} used at {user_code()}")

    def _write(self, expression: Any, batch: fx.Node, emit: Emit) -> Any:
        if expression == self.symbol:
            return batch
        if expression.is_Integer:
            return int(expression)
        if expression.is_number:
            return float(expression)
        parts = [self._write(arg, batch, emit) for arg in expression.args]
        target = _OPERATORS.get(type(expression).__name__)
        if target is None:
            raise CaptureError(
                f"the size {self.text(expression)}, used at {user_code()}, is computed from the batch size "
                "in a way that capture cannot write down; compute it inside a submodule that stays closed"
            )
        if target is float or target is int:
            return emit("call_function", target, tuple(parts), {})
        return functools.reduce(lambda a, b: emit("call_function", target, (a, b), {}), parts)

    def text(self, expression: Any) -> str:
        """Return an expression in terms of B."""
        shown = expression.xreplace({self.symbol: sympy.Symbol("B")}) if self.symbol else expression
        sign = {sympy.Eq: "==", sympy.Ne: "!="}.get(type(shown))
        return f"{shown.lhs} {sign} {shown.rhs}" if sign else str(shown)

    @contextmanager
    def watching(self, paused: Callable[[], bool]) -> Iterator[None]:
        """Note each decision that the user's code takes on a symbolic size."""
        original = torch.SymBool.__bool__
        originals = {name: getattr(torch.SymInt, name) for name in ("__int__", "__index__")}

        def decide(this: torch.SymBool) -> bool:
            expression = this.node.expr
            answer = bool(original(this))  # type: ignore[no-untyped-call]
            # the ShapeEnv assumes B >= 2 and so keeps no record of `if B == 1`
            if not paused() and this.node.shape_env is self.env:
                self.conditions.append((expression if answer else sympy.Not(expression), user_code()))
            return answer

        def fix(name: str) -> Callable[[Any], int]:
            def number(this: torch.SymInt) -> int:
                expression = this.node.expr
                answer = int(originals[name](this))
                if not paused() and this.node.shape_env is self.env:
                    self.conditions.append((sympy.Eq(expression, answer), user_code()))
                return answer

            return number

        torch.SymBool.__bool__ = decide  # type: ignore[method-assign]
        for name in originals:
            setattr(torch.SymInt, name, fix(name))
        try:
            yield
        finally:
            torch.SymBool.__bool__ = original  # type: ignore[method-assign]
            for name, function in originals.items():
                setattr(torch.SymInt, name, function)

    def guards(self) -> list[BatchGuard]:
        """Return every condition on the batch size under which this trace was taken."""
        found: dict[Any, str] = {}
        for guard in self.env.guards:
            found.setdefault(guard.expr, "")
        for expression, place in self.conditions:
            found[expression] = f", at {place}"
        return [
            BatchGuard(self.text(expression) + place, _holds(expression, self.symbol))
            for expression, place in found.items()
            if self.symbol in sympy.sympify(expression).free_symbols
        ]


def _expression(size: Any) -> Any:
    return size.node.expr if is_symbolic(size) else sympy.Integer(size)


def _holds(expression: Any, symbol: Any) -> Callable[[int], bool]:
    @functools.lru_cache(maxsize=256)
    def holds(batch: int) -> bool:
        return bool(expression.xreplace({symbol: sympy.Integer(batch)}))

    return holds


_OPERATORS: dict[str, Any] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "FloatPow": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
    "ToFloat": float,
}
