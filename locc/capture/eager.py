"""Real runs of the user's model: the truth that a capture is compared with, and what each leaf returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from locc import files
from locc.capture.batch import Call
from locc.capture.calls import Calls, intercepting
from locc.capture.patches import functions_patched
from locc.capture.source import user_code
from locc.capture.state import seed_all
from locc.capture.targets import unchanging
from locc.capture.tree import LEAF, Path, Structure, flatten
from locc.errors import CaptureError, LoccError
from locc.ir.captured import Root, strip
from locc.ir.spec import Dim, FreeDim, Point, fit
from locc.snapshot import preserved, values_preserved


@dataclass(frozen=True)
class Sight:
    """What one tensor that a leaf returned looked like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    alias: Path | None = None  # the argument whose storage it shares
    same: bool = False  # it is that argument, as an object


@dataclass(frozen=True)
class Refill:
    """What a leaf put into a container that it was given; `result` is where it returned the same object."""

    value: Any
    result: Path | None


@dataclass
class LeafCall:
    """One call of a closed module.

    Attributes:
        refilled: what it put into the containers that it was given, by path in (args, kwargs).
        resized: it added items to one, or removed some.
    """

    path: str
    results: list[Any] = field(default_factory=list)
    structure: Structure = LEAF
    mutated: set[Path] = field(default_factory=set)
    refilled: dict[Path, Refill] = field(default_factory=dict)
    resized: bool = False


@dataclass
class Run:
    """One forward (and backward, in training) of the model or of a graph."""

    outputs: list[Any]
    structure: Structure
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    calls: list[LeafCall] = field(default_factory=list)
    backward: bool = True


class Eager:
    """Runs the model on the example call, each combination of mode and sizes once."""

    def __init__(self, root: Root, call: Call, opened: frozenset[str]) -> None:
        self.root, self.call, self.opened = root, call, opened
        self.input_gradients = True
        self._runs: dict[tuple[bool, Point], Run] = {}
        self._objects: list[Any] = []  # held, so that an id names one object
        self._seen: Counter[int] = Counter()

    def run(self, training: bool, point: Point, backward: bool = True) -> Run:
        """Return the run in a mode at some sizes, with gradients if asked for; errors are the model's own."""
        key = (training, point)
        if key not in self._runs or (backward and not self._runs[key].backward):
            self._runs[key] = self._run(training, point, backward)
        return self._runs[key]

    def takes(self, tensors: list[Tensor], training: bool) -> bool:
        """Whether the model runs on inputs of other sizes."""
        try:
            with preserved(self.root), torch.no_grad():
                self.root.train(training)
                seed_all()
                inputs = self.call.inputs([t.clone() for t in tensors])
                self.root(*inputs.args, **inputs.kwargs)
        except Exception:  # whatever the user's code raises
            return False
        return True

    def lasting(self, value: Any) -> bool:
        """Whether an object that a leaf received was there in several runs, so none of them made it."""
        return self._seen[id(value)] > 1 or unchanging(value)

    def _run(self, training: bool, point: Point, backward: bool) -> Run:
        observer = _Observer(Calls(self.root, self.opened))

        def forward(tensors: list[Tensor]) -> Any:
            observer.reset(Calls(self.root, self.opened))
            inputs = self.call.inputs(tensors)
            with intercepting(observer.handle), functions_patched(_refuse_reentrant):
                return self.root(*inputs.args, **inputs.kwargs)

        try:
            run = self.measure(forward, training, point, backward)
        except RuntimeError:
            if not (training and self.input_gradients) or self._runs:
                raise
            self.input_gradients = False  # an in-place op on the input, say: users do not ask for these
            run = self.measure(forward, training, point, backward)
        run.calls = observer.calls
        self._objects += observer.objects
        self._seen.update({id(value) for value in observer.objects})
        return run

    def measure(
        self, forward: Callable[[list[Tensor]], Any], training: bool, point: Point, backward: bool = True
    ) -> Run:
        """Run `forward` on the call's tensors from a fixed seed, and leave the model as it was."""
        tensors = self.call.at(point)
        with preserved(self.root), torch.set_grad_enabled(training):
            self.root.train(training)
            leaves = [t.requires_grad_() if training and self.input_gradients and _differentiable(t) else t
                      for t in tensors]  # fmt: skip
            seed_all()
            # an in-place op on an input is legal in eager, where inputs need no gradient: hence the clone
            result = forward([t.clone() if t.requires_grad else t for t in leaves])
            outputs, structure = flatten(result)
            run = Run([_detached(value) for value in outputs], structure, backward=backward or not training)
            if training:
                run.loss = _synthetic_loss(outputs)
                if backward:
                    self._backward(run, leaves)
                if run.loss is not None:
                    run.loss = run.loss.detach()
            run.buffers = {name: files.copy(b) for name, b in self.root.named_buffers()}
        return run

    def remembers(self, training: bool, point: Point) -> bool:
        """Whether a second call from the same buffers and seed gives another output than the first."""
        tensors = self.call.at(point)
        found: list[list[Any]] = []
        with preserved(self.root), torch.set_grad_enabled(training):
            self.root.train(training)
            for _ in range(2):
                with values_preserved(self.root):
                    seed_all()
                    inputs = self.call.inputs([t.clone() for t in tensors])
                    found.append([_detached(v) for v in flatten(self.root(*inputs.args, **inputs.kwargs))[0]])
        pairs = zip(*found, strict=True)
        return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs)

    def _backward(self, run: Run, leaves: list[Tensor]) -> None:
        if run.loss is None or not run.loss.requires_grad:
            return
        wanted: dict[str, Tensor] = {}
        wanted |= {f"parameter '{strip(n)}'": p for n, p in self.root.named_parameters() if p.requires_grad}
        wanted |= {f"input '{n}'": t for n, t in zip(self.call.names, leaves, strict=True) if t.requires_grad}
        if not wanted:
            return
        found = files.gradients(run.loss, list(wanted.values()))
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
        run.gradients = dict(zip(wanted, dense, strict=True))


def _refuse_reentrant(
    function: type[torch.autograd.Function], call: Callable[[], Any], args: Any, kwargs: Any
) -> Any:
    if function is CheckpointFunction:  # behind a cut no input needs a gradient, and it would train nothing
        raise CaptureError(
            f"activation checkpointing with use_reentrant=True, at {user_code()}, gives no gradient "
            "where no input needs one, as at the entry of a module; pass use_reentrant=False (Hugging Face: "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}))"
        )
    return call()


class _Observer:
    """Writes down every call of a closed module."""

    def __init__(self, calls: Calls) -> None:
        self.reset(calls)

    def reset(self, calls: Calls) -> None:
        self.stack = calls
        self.calls: list[LeafCall] = []
        self.objects: list[Any] = []
        self.inside = False

    def handle(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.inside or not self.stack.knows(module):
            return call(module, *args, **kwargs)
        with self.stack.enter(module) as path:
            if not self.stack.is_leaf(module):
                return call(module, *args, **kwargs)
            return self._leaf(path, lambda: call(module, *args, **kwargs), (args, kwargs))

    def _leaf(self, path: str, call: Callable[[], Any], given: Any) -> Any:
        values, structure = flatten(given)
        tensors = {
            where: value
            for where, value in zip(structure.paths(), values, strict=True)
            if isinstance(value, Tensor)
        }
        versions = {where: t._version for where, t in tensors.items() if not t.is_inference()}
        self.objects += {id(v): v for v in values if not isinstance(v, Tensor) and not unchanging(v)}.values()
        seen = LeafCall(path)
        self.calls.append(seen)
        self.inside = True
        try:
            result = call()
        finally:
            self.inside = False
        seen.mutated = {where for where, version in versions.items() if tensors[where]._version != version}
        results, seen.structure = flatten(result)
        returned = dict(zip(map(id, results), seen.structure.paths(), strict=True))
        after, now = flatten(given)
        seen.resized = now != structure
        if not seen.resized:
            for where, old, new in zip(structure.paths(), values, after, strict=True):
                if new is not old:
                    value = _sight(new, tensors) if isinstance(new, Tensor) else new
                    seen.refilled[where] = Refill(value, returned.get(id(new)))
        seen.results = [_sight(value, tensors) if isinstance(value, Tensor) else value for value in results]
        return result


def _sight(tensor: Tensor, given: dict[Path, Tensor]) -> Sight:
    alias, same = None, False
    for where, other in given.items():
        if other is tensor:
            alias, same = where, True
        elif alias is None and _storage(other) is not None and _storage(other) == _storage(tensor):
            alias = where
    strided = tensor.layout == torch.strided
    return Sight(
        tuple(tensor.shape),
        tuple(tensor.stride()) if strided else (),
        int(tensor.storage_offset()) if strided else 0,
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        alias,
        same,
    )


def _storage(tensor: Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and tensor.numel() else None


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _synthetic_loss(outputs: list[Any]) -> Tensor | None:
    generator = torch.Generator().manual_seed(7)
    total: Tensor | None = None
    for value in outputs:
        if not isinstance(value, Tensor) or not _differentiable(value):
            continue
        real = torch.view_as_real(value) if value.is_complex() else value
        weight = torch.randn(real.shape, generator=generator).to(real.device, real.dtype)
        part = (real * weight).sum()
        total = part if total is None else total + part
    return total


def eager_run(eager: Eager, training: bool, point: Point, backward: bool = True) -> Run:
    """Return a run that must succeed.

    Raises:
        CaptureError: the model itself fails.
        LoccError: there is no room for what it makes.
    """
    try:
        return eager.run(training, point, backward)
    except LoccError:
        raise
    except Exception as error:
        mode = "train" if training else "eval"
        raise CaptureError(
            f"the model itself fails on the example inputs, in {mode} mode and before any capture: "
            f"{type(error).__name__}: {error}"
        ) from error


class Records:
    """What the closed modules returned in real runs at one to three points, call by call."""

    def __init__(self, runs: dict[Point, Run], known: list[FreeDim]) -> None:
        self.points, self.runs = list(runs), [run.calls for run in runs.values()]
        self.known = known
        self.position = 0

    def next(self, path: str) -> list[LeafCall]:
        """Return the next call in every run, which must be one of the module at `path`."""
        found = [run[self.position] for run in self.runs if self.position < len(run)]
        self.position += 1
        if not found or found[0].path != path:
            expected = f"calls '{strip(found[0].path)}'" if found else "makes no further call"
            raise CaptureError(
                f"on fake tensors the forward calls '{strip(path)}' where in eager it {expected}, at "
                f"{user_code()}"
            )
        return [call for call in found if call.path == path and call.structure == found[0].structure]

    def dims(self, seen: list[tuple[int, ...]]) -> tuple[Dim, ...] | None:
        """Return the dims of a shape or stride that was seen in every run."""
        if len(seen) < len(self.points):
            return seen[0]
        return fit(dict(zip(self.points, seen, strict=True)), self.known)
