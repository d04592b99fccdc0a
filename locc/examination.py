"""`examine`: what compile would do with a model, or why it cannot. Trains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from locc.capture import Dynamic
from locc.compiler import _method
from locc.errors import LoccError
from locc.filling import filled
from locc.ir import Coupling, Inputs, Root, TensorSpec, TrainingGraph
from locc.ir.captured import strip
from locc.losses import Loss
from locc.lower import lower
from locc.partition import TiedPolicy
from locc.quiet import attempting
from locc.request import Request, Splits, check_target, cut, on_device
from locc.rewrite import Method, apply
from locc.runtime import Settings
from locc.snapshot import preserved


@dataclass(frozen=True)
class ModuleReport:
    """One module of the partition, or an auxiliary that trains alone.

    Attributes:
        name: the owner's name.
        auxiliary: whether it is an auxiliary rather than a part of the model.
        parameters: number of the model's trainable elements that it owns.
        added: number of trainable elements that the method adds to it (heads, decoders, ...).
        objectives: names of its local objectives; empty for a module that nothing trains.
    """

    name: str
    auxiliary: bool
    parameters: int
    added: int
    objectives: tuple[str, ...]


@dataclass(frozen=True)
class Crossing:
    """A value that passes from one module to a later one, and its size for one sample, in bytes."""

    producer: str
    consumer: str
    name: str
    spec: str
    bytes_per_sample: int


@dataclass
class Examination:
    """What `compile` would do, as data and (printed) as text.

    Attributes:
        model: the class of the model.
        method: the method's id.
        problem: why the model cannot be compiled in this way, or None.
        stage: the stage that refuses: "options", "partition" (or the capture before it), "rewrite", "lower".
        parameters: number of the model's trainable elements.
        tied: groups of names under which the model knows one parameter.
        captured_by: what captured the forward: "fx", "concrete" or "export".
        modules: the partition, and after the rewrite the auxiliaries.
        crossings: the boundary values.
        couplings: what ties modules to each other beside the boundary values.
        notes: remarks of the capture.
        complete: whether everything that compile does was tried; not so without example inputs.
        partition: the forward as cut, before the method, as readable Python.
        ir: the training graph, as readable Python.
        plan: the instructions of one step.
    """

    model: str
    method: str
    problem: str | None = None
    stage: str | None = None
    parameters: int = 0
    tied: tuple[tuple[str, ...], ...] = ()
    captured_by: str | None = None
    modules: list[ModuleReport] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    couplings: list[Coupling] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    partition: str | None = None
    ir: str | None = None
    plan: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing stands against compiling."""
        return self.problem is None

    def __str__(self) -> str:
        lines = [f"{self.model} with method '{self.method}': {self.verdict}"]
        lines += [f"  {self.parameters:,} trainable parameters"]
        for names in self.tied:
            lines.append(f"  tied: {' = '.join(names)}")
        if self.modules:
            lines.append(f"modules (captured by {self.captured_by}):")
            width = max(len(m.name) for m in self.modules)
            lines += [f"  {m.name:<{width}}  {_describe(m)}" for m in self.modules]
        if self.crossings:
            lines.append("boundary values:")
            lines += [
                f"  {c.producer} -> {c.consumer}: {c.name} {c.spec}, {c.bytes_per_sample:,} B per sample"
                for c in self.crossings
            ]
        lines += [f"coupling: {text}" for text in self.couplings]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """One line: it compiles, or why it does not."""
        if self.problem is not None:
            return f"cannot be compiled ({self.stage}): {self.problem}"
        if not self.complete:
            return "nothing speaks against it so far; pass example_inputs to try the cuts and the method"
        return "compiles"


def _describe(module: ModuleReport) -> str:
    kind = "auxiliary, " if module.auxiliary else ""
    added = f" + {module.added:,} added" if module.added else ""
    objectives = ", ".join(name.removeprefix(f"{module.name}.") for name in module.objectives)
    trained = f"trains on {objectives}" if objectives else "no objective"
    return f"{kind}{module.parameters:,} parameters{added}, {trained}"


def examine(
    model: nn.Module,
    method: str | Method = "bp",
    splits: Splits = (),
    *,
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    example_inputs: Any = None,
    prediction: str | None = None,
    dynamic: Dynamic = None,
    tied: str = "auto",
    schedule: str = "lockstep",
    **method_options: Any,
) -> Examination:
    """Find out what `compile` would do with a model, or why it cannot.

    Trains nothing, proves nothing, and leaves the model as it is. What the model or the method refuses
    is told by the result, as far as the stages came; nothing is raised for it.

    Args:
        model: any module.
        method: as for `compile`.
        splits: as for `compile`.
        loss: as for `compile`.
        example_inputs: a batch as `step` takes it. Without one, only the options are examined.
        prediction: as for `compile`.
        dynamic: as for `compile`.
        tied: as for `compile`.
        schedule: as for `compile`.
        **method_options: hyper-parameters of the method.

    Raises:
        LoccError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise LoccError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    result = Examination(type(model).__name__, method if isinstance(method, str) else type(method).__name__)
    result.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result.tied = _tied(model)
    policy: TiedPolicy | None = None
    stage = "options"
    try:
        chosen, result.method = _method(method, method_options)
        policy = TiedPolicy(tied, chosen.ties)
        settings = Settings(optimizer=chosen.recipe, schedule=schedule)
        request = Request(
            Root(model), chosen, result.method, splits, Loss(loss), tied, settings, False, dynamic, prediction
        )
        if example_inputs is None:
            return result
        with (
            torch.random.fork_rng(),
            attempting(),
            preserved(model, values=False),
            filled(model, None, None, torch.initial_seed()),
        ):
            inputs = on_device(Inputs.of(model, example_inputs), _device(model))
            stage = "partition"
            ir = cut(request, inputs, policy)
            _describe_partition(result, ir)
            stage = "rewrite"
            apply(chosen, result.method, ir)
            check_target(request, ir, inputs)
            _describe_training(result, ir)
            stage = "lower"
            result.plan = str(lower(ir))
        result.complete = True
    except LoccError as error:
        result.problem, result.stage = str(error), stage
    finally:
        if policy is not None:
            policy.undo()
    return result


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(found) for found in names.values() if len(found) > 1)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _describe_partition(result: Examination, ir: TrainingGraph) -> None:
    result.captured_by = ir.captured.origin
    result.notes = list(ir.captured.notes)
    result.couplings = list(ir.couplings)
    result.partition = str(ir)
    result.crossings = [
        Crossing(b.producer, b.consumer, strip(b.value.name), str(b.spec), _bytes(b.spec))
        for b in ir.boundaries()
    ]
    result.modules = _modules(ir)


def _describe_training(result: Examination, ir: TrainingGraph) -> None:
    result.ir = str(ir)
    result.couplings = list(dict.fromkeys([*result.couplings, *ir.couplings]))
    result.modules = _modules(ir)


def _modules(ir: TrainingGraph) -> list[ModuleReport]:
    found = []
    for owner in (*ir.modules, *(o for o in ir.owners.values() if o.auxiliary)):
        sizes = {path: p.numel() for path, p in ir.parameters(owner.name).items() if p.requires_grad}
        own = sum(size for path, size in sizes.items() if not path.startswith("aux."))
        objectives = tuple(str(node.meta["objective"]) for node in ir.objectives(owner.name))
        found.append(ModuleReport(owner.name, owner.auxiliary, own, sum(sizes.values()) - own, objectives))
    return found


def _bytes(spec: TensorSpec) -> int:
    """Return the bytes that one more sample adds, or the whole size of a value without a batch."""
    one, two = math.prod(spec.concrete(1)), math.prod(spec.concrete(2))
    return (two - one or one) * spec.dtype.itemsize
