"""What was asked to be compiled, and the training graph that comes of it: captured, cut, rewritten."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from locc import files
from locc.budget import Load, MemoryBudget, fewest
from locc.capture import Dynamic, capture, marker_ancestors
from locc.errors import CaptureError, MethodError, RunError, SplitError
from locc.files import Place
from locc.fitting import loads
from locc.ir import Inputs, Root, TrainingGraph
from locc.ir.captured import Captured
from locc.losses import MODEL, Loss, own_loss
from locc.partition import Cut, TiedPolicy, opened_by, partition, places, resolve
from locc.proof.experiment.batch import accepts, made_up, small_batch
from locc.quiet import attempting
from locc.rewrite import Method, apply, options
from locc.rewrite.local_loss import check_heads
from locc.rewrite.passes import refuse_early
from locc.rewrite.targets import examples, wanted
from locc.runtime import Settings, ranks
from locc.snapshot import preserved
from locc.tasks import tasks_of

FEW = 3
"""Samples on which a model is captured: it runs on them, and on one less."""

Splits = int | str | Sequence[str] | MemoryBudget


@dataclass(frozen=True)
class Request:
    """Everything `compile` was asked for, checked as far as possible without example inputs."""

    root: Root
    method: Method
    name: str
    splits: Splits
    loss: Loss
    tied: str
    settings: Settings
    verify: bool
    dynamic: Dynamic = None
    prediction: str | int | None = None
    cache: bool = False
    weights: str | Path | None = None

    def __post_init__(self) -> None:
        refuse_unready(self.root.model)

    def words(self) -> dict[str, str]:
        """Return what was asked for and the training graph does not tell."""
        method = self.method
        given = {name: getattr(method, name) for name in options(type(method))}
        splits = self.splits if isinstance(self.splits, (int, str, MemoryBudget)) else ", ".join(self.splits)
        return {
            "method": f"{self.name} ({method.family}; {method.reference})",
            "options": ", ".join(f"{name}={shorten(repr(v), 120)}" for name, v in given.items()) or "none",
            "splits": str(splits) or "none given: as the model marks them",
        }

    @property
    def meanwhile(self) -> Place | None:
        """Where the model is while it is compiled.

        That is in files, too, where this rank will hold a part of it and none of it is in memory yet.
        """
        settings = self.settings
        shared = settings.schedule in ("pipelined", "replay") and ranks.several()
        if settings.offload is not None or not shared or sys.platform != "linux":
            return settings.files
        tensors = (*self.root.parameters(), *self.root.buffers())
        return files.DISK if any(t.is_meta or files.lies(t) for t in tensors) else None


def rewrite(request: Request, inputs: Inputs, policy: TiedPolicy) -> TrainingGraph:
    """Capture and cut the model, and apply the method."""
    ir = cut(request, inputs, policy)
    apply(request.method, request.name, ir)
    check_target(request, ir, inputs)
    check_local_losses(ir, inputs)
    return ir


def check_target(request: Request, ir: TrainingGraph, inputs: Inputs) -> None:
    """Refuse a loss that takes no target of a kind that the method can read, as far as it can be tried.

    Raises:
        MethodError: it takes others only.
    """
    kinds, output = request.method.target, ir.prediction.meta["spec"]
    if not kinds:
        return
    found = small_batch(ir, inputs)
    tried = (t.to(found.tensors[0].device) for t in examples(kinds, output, found.size))
    nested = len(ir.tasks) > 1 or ir.tasks[0].own(found.target) is not found.target
    if found.stand_in or nested or any(accepts(ir, found.size, target) for target in tried):
        return
    raise MethodError(
        f"method '{request.name}' is undefined on this model: for the output {output} it needs "
        f"{wanted(kinds, output)} as target, and loss '{request.loss.__name__}' does not take that, but "
        f"{found.text}"
    )


def check_local_losses(ir: TrainingGraph, inputs: Inputs) -> None:
    """Refuse a loss of which nothing reads the prediction alone, where a method's heads give nothing else.

    Raises:
        MethodError: there is no such part.
    """
    if ir.nodes(role="head_loss"):
        found = small_batch(ir, inputs)
        if not found.stand_in:
            check_heads(ir, lambda node: made_up(ir, node, found.size), found.target)


def cut(request: Request, inputs: Inputs, policy: TiedPolicy) -> TrainingGraph:
    """Capture the model and cut it into modules, as the method finds it."""
    refuse_early(request.method, request.name, request.root.model)
    refuse_unusable(inputs)
    if isinstance(request.splits, MemoryBudget):
        request = replace(request, splits=fitting(request, request.splits, inputs))
    captured, cuts = captured_with(request, inputs)
    return parted(request, captured, cuts, inputs, policy)


def captured_with(request: Request, inputs: Inputs) -> tuple[Captured, list[Cut]]:
    """Capture the model, on a few samples if that will do, and resolve the splits."""
    few = inputs.head(FEW)
    try:
        captured, cuts = captured_on(request, few, inputs)
        captured.signature.bind(inputs)
    except (CaptureError, RunError):  # it takes no other batch, or treats a large one otherwise
        if few is inputs:
            raise
        captured, cuts = captured_on(request, inputs, inputs)
    captured.example = inputs
    return captured, cuts


def parted(
    request: Request, captured: Captured, cuts: Sequence[Cut], inputs: Inputs, policy: TiedPolicy
) -> TrainingGraph:
    """Cut a captured model into modules."""
    ir = partition(captured, cuts, request.loss, policy)
    if request.loss.name == MODEL:
        own_loss(ir.output_structure())
    ir.tasks = tasks_of(ir, request.loss, request.prediction, inputs)
    (main, *_), tokens = ir.tasks, _gives_tokens(ir)
    ir.prediction = main.value
    reads = tuple(task.name for task in ir.tasks if task.path)
    path = main.path if request.prediction is not None else ()
    ir.loss_function = request.loss.on(main.spec, tokens, reads, path)
    return ir


def fitting(request: Request, wanted: MemoryBudget, inputs: Inputs) -> list[str]:
    """Return the fewest splits that keep to a budget of memory.

    The model is captured once, open at all places where a cut may fall. Each cut is rewritten by the method
    and run on shapes; the model is then as before.

    Raises:
        LoccError: no cut keeps to it, nothing can be cut, or a step does not run on shapes alone.
    """
    schedule, name = request.settings.schedule, str(wanted)
    if schedule not in ("lockstep", "sequential"):
        raise SplitError(
            f"{name} counts what is alive while one batch goes through, and schedule='{schedule}' keeps "
            "several between its modules; use schedule='lockstep' or 'sequential', or name the splits"
        )
    blocks = places(request.root.model, inputs, name)
    each = [block.path for block in blocks[:-1]]
    with torch.random.fork_rng():
        captured, found = captured_with(replace(request, splits=each), inputs)
        by_path = {cut.name: cut for cut in found}

        def weigh(ends: Sequence[int]) -> list[Load]:
            with preserved(request.root, values=False), attempting():
                cuts = [by_path[each[i]] for i in ends]
                policy = TiedPolicy(request.tied, request.method.ties)
                ir = parted(request, replace(captured, notes=[]), cuts, inputs, policy)
                apply(request.method, request.name, ir)
                return loads(ir, request.name, request.settings, inputs, wanted)

        return fewest(wanted, blocks, weigh)


def captured_on(request: Request, samples: Inputs, inputs: Inputs) -> tuple[Captured, list[Cut]]:
    """Capture on some samples of the inputs, and resolve the splits.

    Capturing runs the model end to end and several times, which takes time and may not fit in memory: a
    few samples will do for most models.
    """
    root = request.root
    assert not isinstance(request.splits, MemoryBudget)
    marked, markers = marker_ancestors(root, samples)
    cuts = resolve(root, request.splits, markers, inputs)
    named = [cut.name for cut in cuts if not cut.marker]
    layers = [f"model.{name}" for name in request.method.opened(root.model, named)]
    opened = marked | opened_by([*(cut.path for cut in cuts if not cut.marker), *layers])
    return capture(root, samples, opened, request.dynamic, request.cache), cuts


def _gives_tokens(ir: TrainingGraph) -> bool:
    """Whether the output is one of Hugging Face's, whose `logits` are [B, T, V] where they have a T."""
    structure = ir.output_structure()
    return isinstance(structure, Mapping) and hasattr(structure, "logits")


def refuse_unusable(inputs: Inputs) -> None:
    """Refuse example inputs without a tensor.

    Raises:
        CaptureError: they are such.
    """
    tensors = inputs.tensors()
    if not tensors:
        found = ", ".join(type(value).__name__ for value in (*inputs.args, *inputs.kwargs.values()))
        raise CaptureError(
            f"the example inputs hold no tensor, but {found or 'nothing'}; give a batch as the model takes "
            "it: a tensor, a tuple of arguments, or a dict of keywords"
        )


def refuse_empty(inputs: Inputs) -> None:
    """Refuse example inputs without a sample; a first batch without one is a step's own matter.

    Raises:
        CaptureError: they are such.
    """
    tensors = inputs.tensors()
    if tensors and tensors[0].dim() and not len(tensors[0]):
        raise CaptureError("the example inputs have 0 samples; give two or more")


def refuse_unready(model: nn.Module) -> None:
    """Refuse a model with TorchScript in it, which fails on tensors once it has run on shapes alone.

    And one with a parameter that has no shape yet.

    Raises:
        CaptureError: it has such.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"'{path}'" if path else "the model"
            raise CaptureError(
                f"{what} is TorchScript, which cannot be opened; give the nn.Module that it was made from"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"'{path}' has no shape yet (a lazy module); run the model once on a batch, then compile it"
            )


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Return inputs with their tensors on a device."""

    def move(item: Any) -> Any:
        return item.to(device) if isinstance(item, Tensor) else item

    args, kwargs = torch.utils._pytree.tree_map(move, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)
