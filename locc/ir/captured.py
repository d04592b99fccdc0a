"""What capture hands on: two graphs of the model's forward, and how its inputs and outputs look.

Both graphs are rooted at a `Root`, so every target starts with `model.`. Metadata of a node:

- `spec`: its TensorSpec (nested for structured values, None for what is no tensor)
- `stack`: the calls that enclose it, outermost first, as pairs (dotted path under `Root`, number of
  that call); a leaf module's own call is the last pair
- `stateful`: False for a leaf without parameters that left its buffers as they were (absent otherwise)
- `mutates`: the nodes whose storage it changes in place (absent when there are none)
- `constant`: True where no gradient comes through it, though its dtype would allow one (absent otherwise)
- `random`: True when it draws random numbers (absent otherwise)
- `line`: `file:line` of the user's code, where known
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from locc.errors import LoccError, RunError
from locc.ir.ops import Rebuild
from locc.ir.spec import BatchDim, TensorSpec


class Root(nn.Module):
    """Holds the user's model as `model` and every auxiliary network under `aux`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.aux = nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the user's model."""
        return self.model(*args, **kwargs)


@dataclass(frozen=True)
class Inputs:
    """One batch of model inputs, normalised to a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, x: Any) -> Inputs:
        """Read `x` as a call of `model`: a tensor, a tuple of arguments, or a dict of keywords.

        A dict is taken as keywords when the forward has parameters of these names, and as one
        positional argument otherwise.
        """
        if isinstance(x, Inputs):
            return x
        if isinstance(x, Mapping) and _takes_keywords(model, x):
            return cls((), dict(x))
        if isinstance(x, (tuple, list)):
            return cls(tuple(x), {})
        return cls((x,), {})

    def tensors(self) -> list[Tensor]:
        """Return the tensors in it; the first dimension of the first one is the batch."""
        return [v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)]

    def head(self, samples: int) -> Inputs:
        """Return the first samples of the batch; the batch is the first tensor's first dimension.

        There are a few more where another tensor, that has no batch, has that first dimension.
        """
        tensors = self.tensors()
        if not tensors or tensors[0].dim() == 0 or tensors[0].shape[0] <= samples:
            return self
        size = tensors[0].shape[0]
        while samples < size and any(t.dim() > 0 and t.shape[0] == samples for t in tensors):
            samples += 1

        def cut(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
            return value[:samples] if batched else value

        return Inputs(*tree_map(cut, (self.args, self.kwargs)))


def _takes_keywords(model: nn.Module, x: Mapping[Any, Any]) -> bool:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return all(isinstance(key, str) for key in x)
    return all(key in parameters for key in x)


@dataclass(frozen=True)
class Signature:
    """How a call becomes the graph's placeholders.

    `names` and `specs` describe the tensors of a call in the order of the placeholders; `flatten`
    returns them, or raises ValueError when the call has another structure or other constants.
    """

    names: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    flatten: Callable[[Inputs], list[Tensor]]
    guards: tuple[SizeGuard, ...] = ()
    decisions: tuple[Decision, ...] = ()

    def bind(self, inputs: Inputs) -> list[Tensor]:
        """Return the tensors of a call, in placeholder order.

        Raises:
            RunError: the call has another structure, dtype or shape than the captured one (the batch
                size and the free dimensions may differ), or sizes or values that the model's own code
                treats differently.
        """
        try:
            tensors = self.flatten(inputs)
        except ValueError as error:
            raise RunError(f"the inputs differ from the example inputs: {error}") from error
        sizes = self._sizes(tensors)
        for name, spec, tensor in zip(self.names, self.specs, tensors, strict=True):
            if tuple(tensor.shape) != spec.named(sizes) or tensor.dtype != spec.dtype:
                raise RunError(self._misfit(name, spec, tensor, sizes))
        for guard in self.guards:
            if not guard.holds(sizes):
                found = ", ".join(f"{name} = {sizes[name]}" for name in sizes if name in guard.names)
                raise RunError(
                    f"the model branches on a size ({guard.text}); the captured branch does not cover "
                    f"{found}. Compile again with example_inputs of that size"
                )
        for decision in self.decisions:
            decision.check(tensors)
        return tensors

    def batch_of(self, tensors: Sequence[Tensor]) -> int:
        """Return the batch size of a call's tensors, or 1 when no input has a batch dimension."""
        return self._sizes(tensors)["B"]

    def allows(self, batch: int, probe: int = 0) -> bool:
        """Whether the captured graphs hold at a batch size, and the example's (or other) free dimensions."""
        sizes = {dim.name: dim.at(probe) for spec in self.specs for dim in spec.free} | {"B": batch}
        return all(guard.holds(sizes) for guard in self.guards)

    def _sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Return the batch size as `B` (1 where nothing has one) and each free dimension, as first found."""
        sizes: dict[str, int] = {}
        for spec, tensor in zip(self.specs, tensors, strict=True):
            for dim, n in zip(spec.shape, tensor.shape, strict=False):
                if len(spec.shape) == tensor.dim() and not isinstance(dim, int):
                    sizes.setdefault("B" if isinstance(dim, BatchDim) else dim.name, int(n))
        return {"B": 1} | sizes

    def _misfit(self, name: str, spec: TensorSpec, tensor: Tensor, sizes: dict[str, int]) -> str:
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        free = ", ".join(dict.fromkeys(["B", *(dim.name for spec in self.specs for dim in spec.free)]))
        given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        return (
            f"input '{name}' was compiled as {spec} and now is {found}; only {free} may change, in "
            f"all inputs alike (here {given}). Compile with dynamic='auto', or with "
            "example_inputs of the new shape"
        )


@dataclass(frozen=True)
class SizeGuard:
    """A condition on sizes of the inputs that the captured branch of the user's code depends on.

    Attributes:
        text: the condition, and where in the user's code.
        holds: takes the batch size as `B`, and the free dimensions by name.
        names: what it reads.
    """

    text: str
    holds: Callable[[Mapping[str, int]], bool]
    names: frozenset[str] = frozenset({"B"})


@dataclass(frozen=True)
class Decision:
    """What the user's code decides on values of the inputs, which the captured branch depends on.

    Attributes:
        place: where in the user's code.
        evaluate: takes the tensors of a call, in placeholder order.
        answer: how it came out for the example inputs.
        raises: the other answer does nothing but raise an error (an `assert`).
        remedy: what would leave the decision to the user's code.
    """

    place: str
    evaluate: Callable[[Sequence[Tensor]], bool]
    answer: bool
    raises: bool
    remedy: str

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Hold a batch to the captured branch.

        Raises:
            RunError: it is decided otherwise.
        """
        if self.evaluate(tensors) is self.answer:
            return
        if self.raises:
            raise RunError(f"the model refuses this batch, at {self.place}. Nothing has changed")
        raise RunError(
            f"the model decides on values of its inputs, at {self.place}: that was {self.answer} for the "
            f"example inputs, which is what was captured, and is {not self.answer} for this batch. Nothing "
            f"has changed; give batches that agree; otherwise {self.remedy}"
        )


@dataclass
class Captured:
    """A model as two flat graphs.

    The output node of each graph holds a tuple of flat values; `output` rebuilds the user's
    structure from them, and `inference_output` does where eval mode returns another one.
    """

    root: Root
    training: fx.Graph
    inference: fx.Graph
    signature: Signature
    output: Rebuild
    origin: str
    opened: frozenset[str] = frozenset()
    example: Inputs | None = None
    notes: list[str] = field(default_factory=list)
    inference_output: Rebuild | None = None


def strip(path: str) -> str:
    """Return a path under `Root` in the user's own words."""
    return path.removeprefix("model.") if path != "model" else "the model"


def owned_tensor(root: nn.Module, path: str) -> Tensor | nn.Module | None:
    """Return the parameter, buffer or module at a dotted path, or None."""
    target: Any = root
    for atom in path.split("."):
        target = getattr(target, atom, None)
        if target is None:
            return None
    if isinstance(target, (Tensor, nn.Module)):
        return target
    raise LoccError(f"'{path}' is neither a tensor nor a module")
