"""Who trains in `make bench`: end to end, the loop by hand, and locc."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.handwritten import DetachLoop, EndToEnd, LittleMemory, Loss
from benchmarks.meter import allocated, gradients_of, peak
from benchmarks.models import Attention, Chain, Workload, segments, splits

if TYPE_CHECKING:
    import locc

END_TO_END, LITTLE, HANDWRITTEN, LOCC = "end-to-end", "end-to-end, little memory", "handwritten", "locc dgl"
CHEAP, SMALL = "locc dgl, cheap heads", "locc dgl, little memory"
COMPILED, INDUCTOR = "end-to-end, compiled", "locc dgl, inductor"
WAVE, BATCHES = "locc dgl, a wave of 4", 4


def compiles() -> bool:
    """Whether there is a C++ compiler, which inductor needs on a CPU."""
    return any(map(shutil.which, ("c++", "g++", "clang++")))


@dataclass(frozen=True)
class Contestant:
    """One way to take a training step, and the parameters whose gradients it makes.

    `step` trains on so many `batches`.
    """

    modules: int
    label: str
    step: Callable[[], object]
    parameters: Sequence[Tensor]
    batches: int = 1

    @property
    def compiled(self) -> bool:
        """Whether its kernels pass the dispatcher by, so that the allocator has to be asked."""
        return self.label in (COMPILED, INDUCTOR)

    def peak(self) -> int:
        """Return the peak memory of a step, in bytes."""
        return allocated(self.step) if self.compiled else peak(self.step, self.parameters).total


def end_to_end(workload: Workload, model: Chain, x: Tensor, y: Tensor, label: str = END_TO_END) -> Contestant:
    """Plain backpropagation."""
    trainer = EndToEnd(model, workload.loss, compiled=label == COMPILED)
    return Contestant(1, label, lambda: trainer.step(x, y), gradients_of(model))


def little_memory(workload: Workload, model: Chain, x: Tensor, y: Tensor) -> Contestant:
    """Backpropagation with checkpoints, and updates in the backward pass."""
    trainer = LittleMemory(model, workload.loss)
    return Contestant(1, LITTLE, lambda: trainer.step(x, y), gradients_of(model))


def handwritten(workload: Workload, model: Chain, x: Tensor, y: Tensor, modules: int) -> Contestant:
    """The detach loop."""
    parts = segments(model, modules)
    heads = [workload.head(width) for width in boundary_widths(workload, parts, x)]
    trainer = DetachLoop(parts, heads, workload.loss)
    return Contestant(modules, HANDWRITTEN, lambda: trainer.step(x, y), gradients_of(model, *heads))


def local(
    workload: Workload, model: Chain, x: Tensor, modules: int, label: str = LOCC, **options: Any
) -> locc.Program:
    """Return locc's `dgl`, with the heads of the loop by hand unless its label says what else."""
    import locc  # here, so that --without-locc runs where locc does not import

    def head(boundary: Any, _output: Any) -> nn.Module:
        return workload.head(boundary.shape[workload.feature_axis])

    if label in (CHEAP, SMALL) and workload.heads is not None:
        options |= workload.heads
        for part in model.modules():
            if isinstance(part, Attention):
                part.folded = True
    else:
        options["head"] = head
    if label == SMALL:
        options |= {"update": "in_backward", "recompute": workload.recompute}
    if label == INDUCTOR:
        options["backend"] = "inductor"
    return locc.compile(
        model,
        method="dgl",
        splits=splits(modules),
        loss=workload.loss,
        example_inputs=x,
        optimizer=locc.Recipe(),  # fused Adam, as the references have
        verify=False,
        **options,
    )


def through_locc(
    workload: Workload, model: Chain, x: Tensor, y: Tensor, modules: int, label: str = LOCC
) -> Contestant:
    """The loop by hand through locc."""
    program = local(workload, model, x, modules, label)
    if label == WAVE:
        wave = [(x, y)] * BATCHES
        return Contestant(modules, label, lambda: program.wave(wave), gradients_of(program), BATCHES)
    return Contestant(modules, label, lambda: program.step(x, y), gradients_of(program))


def boundaries(parts: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return the value at each boundary, without leaving a trace in the parts' buffers."""
    values = []
    with torch.no_grad():
        for part in copy.deepcopy(list(parts))[:-1]:
            x = part(x)
            values.append(x)
    return values


def boundary_widths(workload: Workload, parts: Sequence[nn.Module], x: Tensor) -> list[int]:
    """Return the width of each boundary."""
    return [value.shape[workload.feature_axis] for value in boundaries(parts, x)]


def largest_module(
    workload: Workload, model: Chain, x: Tensor, y: Tensor, modules: int, inductor: bool
) -> dict[bool, int]:
    """Return the peak of the most expensive module when each trains alone on its recorded input.

    As in the chain, a module holds its input, and its output, which it hands on. Under True stands the
    peak of modules that are compiled, under False of those that are not. Of modules whose input and
    parameters have the same shapes one is measured, and the one that reads the data.
    """
    parts = segments(copy.deepcopy(model), modules)
    inputs = [x, *boundaries(parts, x)]
    heads = [workload.head(width) for width in boundary_widths(workload, parts, x)]
    found = {False: 0, True: 0}
    different: dict[object, tuple[nn.Module, nn.Module, Tensor]] = {}
    for part, head, entering in zip(parts, [*heads, nn.Identity()], inputs, strict=True):
        shapes = [p.shape for p in gradients_of(part, head)]
        different[type(head), entering is x, entering.shape, *shapes] = part, head, entering
    for part, head, entering in different.values():
        one = Alone(part, head, workload.loss, None if entering is x else entering, x, y)
        one.step()  # the optimizer's state exists only after the first step
        found[False] = max(found[False], peak(one.step, gradients_of(part, head)).total)
        if inductor:
            torch.compiler.reset()  # one code object serves all modules
            one.forward = torch.compile(one.forward, fullgraph=True)
            one.step()
            found[True] = max(found[True], allocated(one.step))
    return found


class Alone:
    """Trains one module on its input; the batch itself counts for nobody."""

    def __init__(
        self, part: nn.Module, head: nn.Module, loss: Loss, entering: Tensor | None, x: Tensor, y: Tensor
    ) -> None:
        def forward(entering: Tensor) -> tuple[Tensor, Tensor]:
            output = part(entering)
            return output, loss(head(output), y)

        self.forward, self.entering, self.x = forward, entering, x
        self.optimizer = torch.optim.Adam([*part.parameters(), *head.parameters()], fused=True)

    def step(self) -> Tensor:
        """Take a step and return the module's output."""
        output, objective = self.forward(self.x if self.entering is None else self.entering.clone())
        objective.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.detach()


def contestants(
    workload: Workload, counts: Sequence[int], with_locc: bool, inductor: Sequence[int]
) -> list[Contestant]:
    """Build all contestants on copies of one model; cheaper heads and little memory are at the largest K.

    End to end is compiled where there is a K in `inductor`, at which locc is compiled as well.
    """
    torch.manual_seed(0)
    model = workload.model()
    x, y = workload.batch()

    def enter(make: Callable[..., Contestant], *given: Any) -> None:
        entered.append(make(workload, copy.deepcopy(model), x, y, *given))

    entered: list[Contestant] = []
    enter(end_to_end)
    if inductor:
        enter(end_to_end, COMPILED)
    enter(little_memory)
    for modules in counts:
        labels = [LOCC, *([INDUCTOR] if modules in inductor else [])] if with_locc else []
        if modules > 1:
            enter(handwritten, modules)
        if modules == max(counts) and with_locc:
            labels += [WAVE, *([CHEAP] if workload.heads else []), SMALL]
        for label in labels:
            enter(through_locc, modules, label)
    return entered
