"""What an owner needs between its turns is in mapped files: training larger than memory.

Here the system is told what comes next and what has had its turn; no result depends on that.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

from torch import Tensor
from torch.utils._pytree import tree_leaves

from locc import files
from locc.files import Place
from locc.ir import TrainingGraph
from locc.ir.view import node_tensors
from locc.runtime.learner import Learner


class Offload:
    """Keeps parameters, buffers, optimizer state and gradients that wait for more in files without a name.

    Tensors of less than a page stay in memory. So does a buffer that the model replaces instead of writing
    to it.

    Args:
        place: "disk" for the folder of temporary files, or a folder.
        ir: whose tensors move now.
        learners: whose state moves after the turn in which it is made.

    Raises:
        LoccError: a tensor is not an ordinary one on the CPU, there is no room, or no file can be made there;
            nothing has moved then.
    """

    def __init__(self, place: Place, ir: TrainingGraph, learners: Mapping[str, Learner]) -> None:
        self._place, self._learners = place, learners
        named = [*ir.root.named_parameters(), *ir.root.named_buffers()]
        for path, tensor in named:
            files.check(path, tensor)
        self._held = {
            owner: list({id(t): t for n in ir.nodes(owner) for _, t in node_tensors(ir.root, n)}.values())
            for owner in ir.owners
        }
        self._at: str | None = None
        self._before: str | None = None
        self._next: dict[tuple[str | None, str | None], str] = {}
        every = [tensor for _, tensor in named]
        files.move(place, every)
        files.advise(every, mmap.MADV_DONTNEED)

    def turn(self, owner: str) -> None:
        """Note that an owner runs: the one before it leaves, the one that came after it last time is read.

        Raises:
            LoccError: there is no room for what the one before it has made.
        """
        if owner == self._at:
            return
        if self._at is not None:
            self.keep(self._at)
            files.advise(self._tensors(self._at), mmap.MADV_DONTNEED)
        self._next[self._before, self._at] = owner
        self._before, self._at = self._at, owner
        if following := self._next.get((self._before, owner)):
            files.advise(self._tensors(following), mmap.MADV_WILLNEED)

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

    def _made(self, owner: str) -> list[Tensor]:
        learner = self._learners.get(owner)
        if learner is None:
            return []
        found = [v for v in tree_leaves(list(learner.optimizer.state.values())) if isinstance(v, Tensor)]
        return [t for t in (*found, *(p.grad for p in learner.parameters)) if t is not None]

    def _tensors(self, owner: str) -> list[Tensor]:
        return self._held[owner] + self._made(owner)
