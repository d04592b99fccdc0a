"""Straight-line code through `torch.compile`: what is compiled, what is not, and why."""

from __future__ import annotations

import itertools
import linecache
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from locc.errors import RunError
from locc.lower import Backward, Code, Plan, Segment, instructions_of
from locc.runtime.masks import made_again

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
        groups: the names of the modules that are compiled together, with `group=`.
        alone: why a module is in no group, by its name.
    """

    backend: str
    pieces: tuple[Piece, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    alone: Mapping[str, str] = field(default_factory=dict)

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
        lines = [f"backend '{self.backend}': {done} pieces"] if self.pieces or not self.groups else []
        if self.groups or self.alone:
            whole = sum(map(len, self.groups))
            lines.append(
                f"backend '{self.backend}': {whole} of {whole + len(self.alone)} modules are compiled in "
                f"{len(self.groups)} group(s)"
            )
            lines += [f"group: {', '.join(group)}" for group in self.groups]
            lines += [f"{name}: in no group, for {reason}" for name, reason in self.alone.items()]
        for name, pieces in self.modules.items():
            eager = [piece for piece in pieces if piece.reason is not None]
            lines.append(f"{name}: {len(pieces) - len(eager)} compiled, {len(eager)} eager")
            for piece in eager:
                lines += [f"  eager: {piece.reason}", *(f"    {line}" for line in piece.text)]
        return "\n".join(lines)


class Compilation:
    """Code that is compiled for segments of one structure, as a code object: one holds eight compilations."""

    def __init__(self, code: Code, owner: str, backend: str) -> None:
        self.serves, self.began = 1, False
        # What the compiler remembers of sizes goes by the file's name. Before PyTorch 2.13 all code without a
        # source shares one code object's compilations (pytorch#124269).
        file = f"<locc {owner} {next(_numbers)}>"
        linecache.cache[file] = (len(code.text), None, code.text.splitlines(True), file)
        named = code.forward.__code__.replace(co_filename=file)
        own = FunctionType(named, code.space, code.forward.__name__)
        self.function = torch.compile(own, backend=self._backend(backend), fullgraph=True)

    def __call__(self, code: Code, *values: Any) -> tuple[Any, ...]:
        """Run a segment's code, compiled first where that is new; `began` says whether it came to run."""
        self.began = False
        results: tuple[Any, ...] = self.function(code.taken(), _silent, *values)
        return results

    def _backend(self, name: str) -> Callable[..., Any]:
        import torch._functorch.config as functorch
        import torch._inductor.config as inductor
        from torch._dynamo.backends.registry import lookup_backend

        real = lookup_backend(name)

        def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            # Dropout draws what it does eagerly; what cannot be compiled is known before anything has run.
            with (
                inductor.patch(fallback_random=True),
                functorch.patch(force_non_lazy_backward_lowering=True, joint_custom_pass=made_again),
            ):
                made = real(graph, inputs)

            def run(*values: Any) -> Any:
                self.began = True
                return made(*values)

            return run

        return compiler


@dataclass
class Codes:
    """The code of a program that has been compiled, and what came of it.

    Segments share a compilation where their code and all that it takes look alike; what they share is guarded
    by the compiler as for one. With `strict`, code that cannot be compiled is an error.
    """

    strict: bool = False
    shared: dict[Hashable, Compilation] = field(default_factory=dict)
    made: dict[Callable[..., Any], Compilation] = field(default_factory=dict)
    pieces: dict[Callable[..., Any], Piece] = field(default_factory=dict)

    def run(
        self, segment: Segment, backend: str, values: list[Any], eagerly: Callable[[], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """Return what a segment makes of values: compiled, or `eagerly` where that cannot be.

        Raises:
            RunError: it cannot be compiled, and `strict` is asked for.
        """
        code = segment.function
        assert isinstance(code, Code)
        piece = self.pieces.get(code)
        if piece is not None and piece.reason is not None:
            return eagerly()
        if torch._C._len_torch_dispatch_stack():  # the compiler would run the code itself, and then raise
            if self.strict:
                raise RunError(
                    f"module '{segment.owner}' cannot be compiled within a TorchDispatchMode (a counter of "
                    "operations, say); leave that, or leave out strict=True, and it runs eagerly there"
                )
            return eagerly()
        if code not in self.made:
            self.made[code] = self._compilation(code, segment.owner, backend, values)
        compilation = self.made[code]
        try:
            results = compilation(code, *values)
        except Exception as error:
            if compilation.began:
                raise
            if compilation.serves > 1:  # others may have used up what one code object can hold
                compilation.serves -= 1
                self.made[code] = Compilation(code, segment.owner, backend)
                return self.run(segment, backend, values, eagerly)
            return self._refused(segment, error, eagerly)
        if piece is None:
            self.pieces[code] = Piece(segment.owner, segment.text)
        return results

    def _compilation(self, code: Code, owner: str, backend: str, values: list[Any]) -> Compilation:
        """Return a compilation of code that looks as this does, a new one if there is none."""
        key = _looks(code, values)
        if key in self.shared:
            self.shared[key].serves += 1
        else:
            self.shared[key] = Compilation(code, owner, backend)
        return self.shared[key]

    def _refused(
        self, segment: Segment, error: Exception, eagerly: Callable[[], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """Run what cannot be compiled, and note why; an error of that is the batch's own, and says more."""
        results = eagerly()
        code = f"'{segment.text[-1]}'"
        if len(segment.text) > 1:
            code = f"the piece of {len(segment.text)} lines that ends with {code}"
        reason = in_a_line(error)
        if self.strict:
            raise RunError(
                f"module '{segment.owner}' cannot be compiled, in {code}: {reason}. Leave out strict=True, "
                "and that runs eagerly; or change what the reason names"
            ) from error
        _log.warning("locc: in module '%s', %s runs eagerly: %s", segment.owner, code, reason)
        self.pieces[segment.function] = Piece(segment.owner, segment.text, reason)
        failed = self.made.pop(segment.function)
        self.shared = {looks: made for looks, made in self.shared.items() if made is not failed}
        return results

    def unknown(self, plan: Plan) -> bool:
        """Whether a step of a plan runs code of which is not known yet whether it can be compiled."""
        found = instructions_of(plan.instructions)
        return any(isinstance(i, Segment) and i.computes and i.function not in self.pieces for i in found)


@contextmanager
def careful(plan: Plan) -> Iterator[None]:
    """Prepare compiled code for what steps of a plan do: hooks come and go, a tape may serve several times.

    Where none does, a backward pass may write into what the forward one has kept for it. The key under which
    PyTorch (2.13) keeps a kernel on disk does not say which of the two it is, but for the tag.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch.compiler.config as compiler

    once = not any(isinstance(i, Backward) and i.retain for i in instructions_of(plan.instructions))
    tag = f"{compiler.cache_key_tag}, masks made again, donated: {once}"
    with (
        dynamo.patch(skip_nnmodule_hook_guards=False),
        functorch.patch(donated_buffer=once),
        compiler.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
    ):
        yield


def _looks(code: Code, values: list[Any]) -> Hashable:
    """Return what is equal for two pieces of code that one compilation may serve."""
    import torch._functorch.config as functorch

    shared = ((name, id(held)) for name, held in code.space.items() if name != "forward")
    looks: list[Hashable] = [code.text, functorch.donated_buffer, *shared]
    for held in (*vars(code.taken()).values(), *values):
        leaves: list[Any] = tree_leaves(held)
        if isinstance(held, nn.Module):
            looks += ((name, type(module)) for name, module in held.named_modules())
            leaves = [*held.parameters(), *held.buffers()]
        looks += (
            (t.shape, t.dtype, t.requires_grad) if isinstance(t, Tensor) else (type(t),) for t in leaves
        )
    return tuple(looks)


def _silent(number: int) -> None:
    """Take the place of what starts a random stream: that has been done."""


def in_a_line(error: Exception) -> str:
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
