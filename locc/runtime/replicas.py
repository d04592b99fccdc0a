"""Data parallelism inside a stage: ranks that run the same modules, each on its share of every batch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from locc.errors import MethodError, RunError
from locc.ir import Phase, TrainingGraph
from locc.ir.state import states
from locc.lower import Assign, every_plan, instructions_of

QUICK = 2e-3
"""Seconds for which a rank looks for the others without a pause."""
PAUSE = 2e-4


class Replicas:
    """The ranks of one stage.

    All hold the same parameters, optimizer state and buffers: gradients and objectives are means over the
    whole batch, and what a forward pass leaves in buffers is that of the first of them, as with PyTorch's
    `DistributedDataParallel`. Random streams differ.

    Attributes:
        number: of this one.
        size: how many there are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        number: int,
        size: int,
        buffers: Iterable[Tensor],
        guarded: Callable[[Callable[[Callable[[], None]], None]], None],
    ) -> None:
        """Set up the ranks of a stage.

        Args:
            group: of its ranks, in order.
            number: of this one.
            size: how many there are.
            buffers: of the stage's modules.
            guarded: runs what is called with a function to look around while it waits, and says which rank
                is gone where it fails.
        """
        self.number, self.size, self._group, self._guarded = number, size, group, guarded
        self._weight = 1 / size
        self._buffers = [(buffer, 0) for buffer in buffers]

    def part(self, ir: TrainingGraph, values: Sequence[Any], step: int) -> list[Any]:
        """Begin a step: return this rank's rows of a batch.

        Args:
            ir: the program's graph.
            values: of a plan's inputs, the target last.
            step: the number of the batch.

        Raises:
            RunError: there are fewer samples than replicas.
        """
        *tensors, target = values
        batch = len(target) if all(t is None for t in tensors) else ir.captured.signature.batch_of(tensors)
        start, end = (batch * n // self.size for n in (self.number, self.number + 1))
        if batch < self.size:
            raise RunError(
                f"batch {step} has {batch} sample(s), and {self.size} replicas share each batch; give "
                "batches of at least as many (drop_last=True leaves out a small last one)"
            )
        self._weight = (end - start) / batch
        self._buffers = [(buffer, buffer._version) for buffer, _ in self._buffers]

        def rows(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor if dim is None else tensor.narrow(dim, start, end - start)

        specs = [node.meta["spec"] for node in ir.inputs]
        mine = [
            None if t is None else rows(t, spec.batch_dim) for t, spec in zip(tensors, specs, strict=True)
        ]
        own = tree_map_only(Tensor, lambda t: rows(t, 0 if t.dim() and t.shape[0] == batch else None), target)
        return [*mine, own]

    def mean(self, tensors: Iterable[Tensor]) -> None:
        """Set each tensor to its mean over the ranks, weighted by their samples; every rank calls it."""

        def average(flat: Tensor) -> Any:
            return dist.all_reduce(flat.mul_(self._weight), group=self._group, async_op=True)

        self._together(tensors, average)

    def settle(self) -> None:
        """End a step: take over the buffers of the first rank; every rank calls it.

        BatchNorm's kernel does not say what it wrote, so that all with a fraction go.
        """

        def take(flat: Tensor) -> Any:
            return dist.broadcast(flat, group=self._group, group_src=0, async_op=True)

        self._together(
            [b for b, version in self._buffers if b.is_floating_point() or b._version != version], take
        )

    def _together(self, tensors: Iterable[Tensor], collective: Callable[[Tensor], Any]) -> None:
        """Run a collective on tensors, those of one dtype in one piece."""
        kinds: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            kinds[tensor.dtype].append(tensor)
        with torch.no_grad():
            for dtype, alike in kinds.items():
                flat = torch.cat([t.detach().reshape(-1) for t in alike]).cpu()
                flat = flat.view(torch.uint8) if dtype == torch.bool else flat
                self._call(partial(collective, flat))
                for tensor, value in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                    tensor.copy_(value.view(dtype).view(tensor.shape))

    def _call(self, collective: Callable[[], Any]) -> None:
        def wait(look: Callable[[], None]) -> None:
            work, started = collective(), time.perf_counter()
            while not work.is_completed():
                if time.perf_counter() > started + QUICK:
                    look()
                    time.sleep(PAUSE)
            work.wait()

        self._guarded(wait)


def check(ir: TrainingGraph, phases: Iterable[Phase], name: str) -> None:
    """Refuse a program of which shares of a batch make something else than the whole.

    Raises:
        MethodError: says what it sets without a gradient.
    """
    sets = [
        i
        for plan in every_plan(ir, phases)
        for i in instructions_of(plan.instructions)
        if isinstance(i, Assign)
    ]
    kept = [f"state '{state.name}' of module '{state.owner}'" for _, state in states(ir.root)]
    kept += [f"'{one.path}' of module '{one.owner}' by a formula of the batch" for one in sets]
    sparse = [
        f"gradients of '{path}' that are sparse"
        for path, module in ir.root.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    ]
    if kept or sparse:
        raise MethodError(
            f"replicas= takes means of gradients over shares of a batch, and method '{name}' has "
            f"{(kept or sparse)[0]}, of which that is not defined; leave replicas= out"
        )
