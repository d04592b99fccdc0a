"""What an owner needs between its turns is elsewhere: training larger than memory.

Here an owner's turn is noted, and the one that will follow is told from what has followed last time; no
result depends on that. Where the tensors are meanwhile is a subclass's: `OnDisk`, and `visits.InHostMemory`.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from locc import files
from locc.files import Place
from locc.ir import TrainingGraph
from locc.ir.memory import memory_of
from locc.ir.readers import readers
from locc.ir.view import node_tensors
from locc.runtime.learner import Learner


class Offload:
    """Knows what tensors an owner needs, and whose turn it is.

    Attributes:
        device: where owners compute, if that is not where the model is between two steps.
    """

    device: torch.device | None = None

    def __init__(self, ir: TrainingGraph, learners: Mapping[str, Learner]) -> None:
        self._learners = learners
        self._held = slots(ir)
        self._at: str | None = None
        self._before: str | None = None
        self._next: dict[tuple[str | None, str | None], str] = {}

    def turn(self, owner: str, values: Mapping[str, Any]) -> None:
        """Note that an owner runs, with these values in flight.

        Raises:
            LoccError: there is no room for what the one before it has made.
        """
        if owner == self._at:
            return
        self._next[self._before, self._at] = owner
        self._change(self._at, owner, self._next.get((self._at, owner)), values)
        self._before, self._at = self._at, owner

    def rest(self) -> None:
        """Note that nobody runs: what is outside of a step finds the tensors as it should."""

    def keep(self, owner: str) -> None:
        """Put what an owner's optimizer has, and its gradients that wait for more, where they belong.

        Raises:
            LoccError: there is no room.
        """
        raise NotImplementedError

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor where there is room for it.

        Raises:
            LoccError: there is none.
        """
        raise NotImplementedError

    def _change(self, left: str | None, owner: str, following: str | None, values: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _made(self, owner: str) -> list[Tensor]:
        learner = self._learners.get(owner)
        if learner is None:
            return []
        found = [v for v in tree_leaves(list(learner.optimizer.state.values())) if isinstance(v, Tensor)]
        return [t for t in (*found, *(p.grad for p in learner.parameters)) if t is not None]

    def _tensors(self, owner: str) -> list[Tensor]:
        held = (table.get(name) for table, name in self._held[owner])
        return [*(t for t in held if t is not None), *self._made(owner)]


class OnDisk(Offload):
    """Keeps parameters, buffers, optimizer state and gradients that wait for more in files without a name.

    The system is told what comes next and what has had its turn. Tensors of less than a page stay in memory.
    So does a buffer that the model replaces instead of writing to it.

    Args:
        place: "disk" for the folder of temporary files, or a folder.
        ir: whose tensors move now.
        learners: whose state moves after the turn in which it is made.

    Raises:
        LoccError: a tensor is not an ordinary one on the CPU, there is no room, or no file can be made there;
            nothing has moved then.
    """

    def __init__(self, place: Place, ir: TrainingGraph, learners: Mapping[str, Learner]) -> None:
        super().__init__(ir, learners)
        self._place = place
        named = [*ir.root.named_parameters(), *ir.root.named_buffers()]
        for path, tensor in named:
            files.check(path, tensor)
        every = [tensor for _, tensor in named]
        files.move(place, every)
        files.advise(every, mmap.MADV_DONTNEED)

    def keep(self, owner: str) -> None:
        """Move into files what an owner's optimizer has in memory, and its gradients that wait for more.

        Raises:
            LoccError: there is no room.
        """
        files.move(self._place, self._made(owner))

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor that lies in a file as well; a small one, in memory.

        Raises:
            LoccError: there is no room.
        """
        return files.copy(tensor, self._place)

    def _change(self, left: str | None, owner: str, following: str | None, values: Mapping[str, Any]) -> None:
        if left is not None:
            self.keep(left)
            files.advise(self._tensors(left), mmap.MADV_DONTNEED)
        if following is not None:
            files.advise(self._tensors(following), mmap.MADV_WILLNEED)


def slots(ir: TrainingGraph) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Return where the modules have what each owner reads, in training or inference: tables and names.

    A tensor may be replaced. An owner also reads what another one has lent it: its tape keeps that, when the
    value that it came as is gone. Inference reads in its place what training is sent of another owner's.
    """
    found: dict[str, dict[tuple[int, str], tuple[dict[str, Any], str]]] = {owner: {} for owner in ir.owners}
    reading = readers(ir.root, set(ir.graph.nodes))
    for node in [*ir.graph.nodes, *ir.inference.nodes]:
        for path, tensor in node_tensors(ir.root, node):
            home, _, name = path.rpartition(".")
            module = ir.root.get_submodule(home)
            table: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            for user in (node, *reading.get(memory_of(tensor), ())):
                if (owner := user.meta.get("owner")) in found:
                    found[owner][id(table), name] = (table, name)
    return {owner: list(held.values()) for owner, held in found.items()}
