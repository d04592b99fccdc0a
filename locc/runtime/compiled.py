"""Straight-line code through `torch.compile`: what is compiled, what is not, and why."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch

from locc.errors import RunError
from locc.lower import Plan, Segment, instructions_of

_log = logging.getLogger("locc")
_numbers = itertools.count()
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class Piece:
    """A piece of a module's code that has run: what it computes, and why it is not compiled, if so."""

    module: str
    text: tuple[str, ...]
    reason: str | None = None


@dataclass(frozen=True)
class BackendReport:
    """What of a program's code is compiled, as data and as text.

    Attributes:
        backend: its name.
        pieces: all that has run since the program was compiled, in the order in which it first ran.
    """

    backend: str
    pieces: tuple[Piece, ...] = ()

    @property
    def eager(self) -> tuple[Piece, ...]:
        """The pieces that PyTorch's eager operators run one by one, each with its reason."""
        return tuple(piece for piece in self.pieces if piece.reason is not None)

    @property
    def modules(self) -> dict[str, tuple[Piece, ...]]:
        """The pieces by module."""
        names = dict.fromkeys(piece.module for piece in self.pieces)
        return {name: tuple(p for p in self.pieces if p.module == name) for name in names}

    def __str__(self) -> str:
        if self.backend == "eager":
            return "backend 'eager': nothing is compiled"
        done = f"{len(self.pieces) - len(self.eager)} of {len(self.pieces)}"
        if self.backend == "vmap":
            alone = (f"{piece.module}: runs by itself, for {piece.reason}" for piece in self.eager)
            return "\n".join([f"backend 'vmap': {done} modules run with others as one", *alone])
        if self.backend == "cudagraphs":
            alone = (f"{piece.module}: runs eagerly, for {piece.reason}" for piece in self.eager)
            return "\n".join([f"backend 'cudagraphs': {done} turns of modules are recorded", *alone])
        lines = [f"backend '{self.backend}': {done} pieces"]
        for name, pieces in self.modules.items():
            eager = [piece for piece in pieces if piece.reason is not None]
            lines.append(f"{name}: {len(pieces) - len(eager)} compiled, {len(eager)} eager")
            for piece in eager:
                lines += [f"  eager: {piece.reason}", *(f"    {line}" for line in piece.text)]
        return "\n".join(lines)


class Compilation:
    """A segment's function, compiled with a code object of its own: one holds eight compilations, no more."""

    def __init__(self, segment: Segment, backend: str) -> None:
        given: Any = segment.function  # a partial, of the root
        self.given, self.began = given.args, False
        # What the compiler remembers of sizes goes by the file's name.
        code = given.func.__code__.replace(co_filename=f"<locc {segment.owner} {next(_numbers)}>")
        own = FunctionType(code, given.func.__globals__, given.func.__name__)
        self.function = torch.compile(own, backend=self._backend(backend), fullgraph=True)

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        """Run the code, compiled first where that is new; `began` says whether it came to run."""
        self.began = False
        results: tuple[Any, ...] = self.function(*self.given, _silent, *values)
        return results

    def _backend(self, name: str) -> Callable[..., Any]:
        import torch._functorch.config as functorch
        import torch._inductor.config as inductor
        from torch._dynamo.backends.registry import lookup_backend

        real = lookup_backend(name)

        def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            # Dropout draws what it does eagerly; what cannot be compiled is known before anything has run.
            with inductor.patch(fallback_random=True), functorch.patch(force_non_lazy_backward_lowering=True):
                made = real(graph, inputs)

            def run(*values: Any) -> Any:
                self.began = True
                return made(*values)

            return run

        return compiler


@dataclass
class Codes:
    """The code of a program that has been compiled, by the function that it was, and what came of it.

    With `strict`, code that cannot be compiled is an error.
    """

    strict: bool = False
    made: dict[Callable[..., Any], Compilation] = field(default_factory=dict)
    pieces: dict[Callable[..., Any], Piece] = field(default_factory=dict)

    def run(
        self, segment: Segment, backend: str, values: list[Any], eagerly: Callable[[], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """Return what a segment makes of values: compiled, or `eagerly` where that cannot be.

        Raises:
            RunError: it cannot be compiled, and `strict` is asked for.
        """
        key = segment.function
        piece = self.pieces.get(key)
        if piece is not None and piece.reason is not None:
            return eagerly()
        if key not in self.made:
            self.made[key] = Compilation(segment, backend)
        try:
            results = self.made[key](*values)
        except Exception as error:
            if self.made[key].began:
                raise
            return self._refused(segment, error, eagerly)
        if piece is None:
            self.pieces[key] = Piece(segment.owner, segment.text)
        return results

    def _refused(
        self, segment: Segment, error: Exception, eagerly: Callable[[], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """Run what cannot be compiled, and note why; an error of that is the batch's own, and says more."""
        results = eagerly()
        code = f"'{segment.text[-1]}'"
        if len(segment.text) > 1:
            code = f"the piece of {len(segment.text)} lines that ends with {code}"
        reason = _reason(error)
        if self.strict:
            raise RunError(
                f"module '{segment.owner}' cannot be compiled, in {code}: {reason}. Leave out strict=True, "
                "and that runs eagerly; or change what the reason names"
            ) from error
        _log.warning("locc: in module '%s', %s runs eagerly: %s", segment.owner, code, reason)
        self.pieces[segment.function] = Piece(segment.owner, segment.text, reason)
        del self.made[segment.function]
        return results

    def unknown(self, plan: Plan) -> bool:
        """Whether a step of a plan runs code of which is not known yet whether it can be compiled."""
        found = instructions_of(plan.instructions)
        return any(isinstance(i, Segment) and i.computes and i.function not in self.pieces for i in found)


@contextmanager
def careful() -> Iterator[None]:
    """Prepare compiled code for what steps do: hooks come and go, a tape serves several backward passes."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    with dynamo.patch(skip_nnmodule_hook_guards=False), functorch.patch(donated_buffer=False):
        yield


def _silent(node: str) -> None:
    """Take the place of what starts a random stream: that has been done."""


def _reason(error: Exception) -> str:
    """Return what the compiler says, in a line, with the line of code if that is somebody's own."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    if isinstance(error, FailOnRecompileLimitHit) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else type(error).__name__
    why = next((line.partition(":")[2].strip() for line in lines if line.startswith("Explanation:")), "")
    stack = getattr(error, "real_stack", None) or ()
    frames = [frame for frame in stack if not frame.filename.startswith(("<", _TORCH))]
    place = f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{told}{': ' + why if why else ''}".rstrip(".") + place
