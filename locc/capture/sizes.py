"""Symbolic sizes: how they are written into the graph, and the conditions that the code puts on them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from locc.capture.source import user_code
from locc.errors import CaptureError
from locc.ir.captured import SizeGuard
from locc.ir.spec import BatchDim, Dim, FreeDim, Point

Emit = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], fx.Node]
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_symbolic(value: Any) -> bool:
    """Whether a number depends on the sizes of the inputs."""
    return isinstance(value, _SYMBOLIC)


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are one expression, without a decision."""
    return bool(_expression(one) == _expression(other))


class Sizes:
    """The symbols of the batch size and of the free dimensions, and how their expressions become nodes.

    A size that a closed module makes of a free dimension (a strided convolution, say) gets a symbol of its
    own: what it is stays the module's business, and the graph reads it off the tensor.
    """

    def __init__(self, point: Point, batched: bool, free: Sequence[FreeDim]) -> None:
        # a shape that depends on data has no spec, so such an op must fail
        self.env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.names: dict[Any, str] = {}
        self.hints: dict[Any, int] = {}
        self.batch: Any = point.batch
        self.conditions: list[tuple[Any, str]] = []
        self._sources: list[tuple[Tensor, int]] = []
        self._made: dict[FreeDim, Any] = {}
        if batched and point.batch is not None:
            self.batch = self._symbol("B", point.batch)
        for dim in free:
            self._made[dim] = self._symbol(dim.name, dim.size)
        self.inputs = frozenset(self.names)

    def _symbol(self, name: str, hint: int) -> Any:
        from torch._dynamo.source import ConstantSource

        source = ConstantSource(name)
        symbol = self.env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        self.names[symbol], self.hints[symbol] = name, hint
        return self.env.create_symintnode(symbol, hint=hint, source=source)

    def of(self, dim: Dim) -> Any:
        """Return the (symbolic) size of a dimension."""
        if isinstance(dim, int):
            return dim
        if isinstance(dim, BatchDim):
            return self.batch * self.of(dim.scale) + dim.offset
        if dim not in self._made:
            self._made[dim] = self._multiple(dim) or self._symbol(f"size{len(self._made)}", dim.size)
        return self._made[dim]

    def _multiple(self, dim: FreeDim) -> Any:
        for known, size in list(self._made.items()):
            factor = dim.size // known.size
            if (factor * known.size, factor * known.other) == (dim.size, dim.other):
                return size * factor
        return None

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
        parts: dict[Any, fx.Node] = {}
        for tensor, i in candidates:
            part = _expression(tensor.shape[i])
            if part in expression.free_symbols and part not in parts:
                parts[part] = emit("call_method", "size", (node_of(tensor), i), {})
        if expression.free_symbols <= parts.keys():
            return self._write(expression, parts, emit)
        raise CaptureError(f"cannot compute the size {self.text(expression)} used at {user_code()}")

    def _write(self, expression: Any, sizes: dict[Any, fx.Node], emit: Emit) -> Any:
        if expression in sizes:
            return sizes[expression]
        if expression.is_Integer:
            return int(expression)
        if expression.is_number:
            return float(expression)
        parts = [self._write(arg, sizes, emit) for arg in expression.args]
        target = _OPERATORS.get(type(expression).__name__)
        if target is None:
            raise CaptureError(
                f"the size {self.text(expression)}, used at {user_code()}, is computed from the sizes of "
                "the inputs in a way that capture cannot write down; compute it inside a submodule that "
                "stays closed"
            )
        if target is float or target is int:
            return emit("call_function", target, tuple(parts), {})
        return functools.reduce(lambda a, b: emit("call_function", target, (a, b), {}), parts)

    def text(self, expression: Any) -> str:
        """Return an expression in terms of B and the names of free dimensions."""
        shown = sympy.sympify(expression).xreplace({s: sympy.Symbol(n) for s, n in self.names.items()})
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

    def guards(self) -> list[SizeGuard]:
        """Return every condition on the sizes of the inputs under which this trace was taken."""
        found: dict[Any, str] = {}
        for guard in self.env.guards:
            # a condition on what a closed module makes of a size, the operation itself sees to
            if sympy.sympify(guard.expr).free_symbols <= self.inputs:
                found.setdefault(guard.expr, "")
        for expression, place in self.conditions:
            found[expression] = f", at {place}"
        return [
            self._guard(sympy.sympify(expression), place)
            for expression, place in found.items()
            if sympy.sympify(expression).free_symbols
        ]

    def _guard(self, expression: Any, place: str) -> SizeGuard:
        text = self.text(expression) + place
        if expression.free_symbols <= self.inputs:
            names = {symbol: self.names[symbol] for symbol in expression.free_symbols}
            return SizeGuard(text, _holds(expression, names), frozenset(names.values()))
        # what a closed module makes of a size is not known before it runs, so only the example's will do
        sizes = {
            self.names[symbol]: self.hints[symbol] for symbol in self.inputs if self.names[symbol] != "B"
        }
        return SizeGuard(
            f"a size that a closed module gives: {text}",
            lambda given: all(given.get(name, size) == size for name, size in sizes.items()),
            frozenset(sizes),
        )


def _expression(size: Any) -> Any:
    return size.node.expr if is_symbolic(size) else sympy.Integer(size)


def _holds(expression: Any, names: dict[Any, str]) -> Callable[[Mapping[str, int]], bool]:
    @functools.lru_cache(maxsize=256)
    def holds(*sizes: int) -> bool:
        return bool(expression.xreplace(dict(zip(names, map(sympy.Integer, sizes), strict=True))))

    return lambda given: holds(*(given[name] for name in names.values()))


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
