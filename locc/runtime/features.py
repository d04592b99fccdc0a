"""What modules at rest hand to those that train, computed once a stage and kept by sample."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from locc.ir import Coupling, Phase, TrainingGraph
from locc.ir.captured import Signature
from locc.lower import Plan, Resting, at_rest
from locc.runtime.executor import Executor
from locc.runtime.machine import Held
from locc.runtime.records import MEMORY, InFile, InMemory, Records, size_of
from locc.runtime.rows import Layout, close, pick, row_dims

AGAIN = 0.05
"""A pass that finds a smaller share of what it should find reads other inputs than the one before."""

Compute = Callable[..., dict[str, Any]]
"""Runs what rests on values of a plan's inputs, and the step on whose random streams."""

_log = logging.getLogger("locc")


class Storage:
    """Where the features of a fit are, and how many bytes of them may be kept at a time.

    Attributes:
        used: how many are.
        off: nothing is kept any more in this fit.
    """

    def __init__(self, place: str | Path, limit: int | str) -> None:
        self.place, self.limit, self.used, self.off = place, size_of(limit), 0, False
        self._said: set[str] = set()

    def open(self) -> Records:
        """Return an empty store of records; raises OSError where no file can be made."""
        if self.place == MEMORY:
            return InMemory()
        return InFile(None if self.place == "disk" else self.place)

    def say(self, text: str) -> None:
        """Log, once in a fit, why something is not kept."""
        if text not in self._said:
            self._said.add(text)
            _log.warning("locc: features=%r: %s", str(self.place), text)


@dataclass
class Shelf:
    """The samples of one input shape: where their records are, and how to read them."""

    trees: dict[str, TreeSpec]
    layouts: list[Layout]
    at: dict[bytes, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, resting: Resting, values: dict[str, Any], batch: int) -> Shelf:
        """Return an empty shelf for samples of this batch's shape."""
        trees, layouts = {}, []
        for send in resting.sent:
            leaves, trees[send.value] = tree_flatten(values[send.value])
            dims = row_dims(send.spec) or []
            layouts += [Layout.of(leaf, dim, batch) for leaf, dim in zip(leaves, dims, strict=True)]
        return cls(trees, layouts)

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return sum(layout.size for layout in self.layouts)

    def apart(self, values: dict[str, Any], batch: int) -> Tensor:
        """Return the records of a batch, [batch, size]."""
        rows = [
            layout.apart(leaf, batch)
            for leaf, layout in zip(tree_leaves([values[n] for n in self.trees]), self.layouts, strict=True)
        ]
        return (rows[0] if len(rows) == 1 else torch.cat(rows, 1)).cpu()

    def together(self, records: Tensor, device: torch.device) -> dict[str, Any]:
        """Return the values that records were taken from."""
        parts = records.split([layout.size for layout in self.layouts], 1)
        leaves = [layout.together(part).to(device) for part, layout in zip(parts, self.layouts, strict=True)]
        found, start = {}, 0
        for name, tree in self.trees.items():
            found[name] = tree_unflatten(leaves[start : start + tree.num_leaves], tree)
            start += tree.num_leaves
        return found


class Features:
    """What rests in a phase hands on, by sample.

    A sample goes by a digest of what the resting program reads of it, so that it does not matter how a
    loader shuffles, and a sample that was augmented is another one. What the first batch gives is computed a
    second time among other samples: where that makes a difference, nothing is kept.

    Attributes:
        plan: of the phase.
        found: how many samples of the pass had been kept when it met them.
        seen: how many it has met.
    """

    def __init__(
        self, phase: Phase, plan: Plan, resting: Resting, signature: Signature, storage: Storage
    ) -> None:
        self.plan, self.found, self.seen, self._name = plan, 0, 0, phase.name
        self._resting, self._signature, self._storage = resting, signature, storage
        specs, read = plan.specs, resting.first.read
        self._read = {n: (row_dims(specs.get(n)) or [0])[0] for n in plan.inputs if n in read}
        self._records: Records | None = None
        self._shelves: dict[bytes, Shelf] = {}
        self._used = self._before = self._tried = 0
        self._keeps = self._refused = False
        self._state = self._stamp()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Stay behind when the program is copied, for the copy does not train."""

    # ---- a pass -----------------------------------------------------------------------------

    def begin(self, later: Iterable[Phase]) -> None:
        """Begin a pass, which keeps something new if its phase comes again before what rests trains.

        Args:
            later: the phases of the passes after it.
        """
        self.found = self.seen = 0
        self._before = sum(len(shelf.at) for shelf in self._shelves.values())
        rests, self._keeps = set(self._resting.first.runs), False
        for phase in later:
            if phase.name == self._name or not rests.isdisjoint(phase.trains):
                self._keeps = phase.name == self._name
                return

    def end(self) -> float | None:
        """End a pass, and keep nothing any more where it has found (nearly) nothing again.

        Returns the share of its samples that needed nothing at rest; None where that was not tried.
        """
        if self.found < AGAIN * min(self._before, self.seen):
            self._storage.off = True
            self.close()
            self._storage.say(
                f"of {self.seen} samples of a pass {self.found} had been met in the one before: the inputs "
                "change from pass to pass (augmentation, for one), so every step computes what rests as well"
            )
        return self.found / self.seen if self.seen else None

    def close(self) -> None:
        """Forget everything."""
        self._shelves = {}
        self._storage.used -= self._used
        self._used = 0
        if self._records is not None:
            self._records.close()
            self._records = None

    # ---- a step -----------------------------------------------------------------------------

    def run(
        self, executor: Executor, values: Sequence[Any], step: int
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Run one step of the phase; see `Executor.run`."""

        def compute(values: Sequence[Any], step: int = step) -> dict[str, Any]:
            passed = Held()
            executor.run(self._resting.first, values, step, passed)
            return passed.values

        useful = (self._keeps or self._shelves) and not (self._refused or self._storage.off)
        crossing = self._crossing(compute, values, step, executor.device) if useful else compute(values)
        return executor.run(self._resting.then, values, step, Held(crossing))

    def _crossing(
        self, compute: Compute, values: Sequence[Any], step: int, device: torch.device
    ) -> dict[str, Any]:
        batch = self._signature.batch_of(values[:-1])
        rows = self._rows(values, batch)
        if rows is None:
            return compute(values)
        if self._stamp() != self._state:  # somebody has changed what rests
            self.close()
            self._state, self._before = self._stamp(), 0
        shape, keys = _digests(rows, batch)
        shelf, tried = self._shelves.get(shape), self._tried >= min(batch, 2)
        missing = [i for i, key in enumerate(keys) if not (tried and shelf and key in shelf.at)]
        few = missing if len(missing) > 1 else missing * 2  # a model may take one sample for none
        if missing and not self._signature.allows(len(few)):
            missing = list(range(batch))
        self.seen, self.found = self.seen + batch, self.found + batch - len(missing)
        if len(missing) == batch:
            made = compute(values)
            if self._keeps and (tried or self._try(compute, values, batch, step, made)):
                shelf = shelf or self._shelves.setdefault(shape, Shelf.of(self._resting, made, batch))
                self._keep(shelf, keys, shelf.apart(made, batch))
            return made
        assert shelf is not None
        assert self._records is not None
        there = sorted(set(range(batch)).difference(missing))
        records = self._records.read([shelf.at[keys[i]] for i in there], shelf.size)
        if missing:
            made = compute(self._some(values, batch, few))
            new = shelf.apart(made, len(few))[: len(missing)]
            self._keep(shelf, [keys[i] for i in missing], new)
            records = torch.cat([records, new])[torch.tensor([*there, *missing]).argsort()]
        return shelf.together(records, device)

    def _keep(self, shelf: Shelf, keys: list[bytes], records: Tensor) -> None:
        """Keep the records of samples that are not kept yet, as far as there is room."""
        storage = self._storage
        new = {key: i for i, key in enumerate(keys) if key not in shelf.at} if self._keeps else {}
        room = (storage.limit - storage.used) // shelf.size
        if len(new) > room:
            storage.say(
                f"features_limit={storage.limit} bytes are used: for all other samples what rests is "
                "computed in every step"
            )
        rows = list(new.values())[:room]
        if not rows:
            return
        try:
            self._records = self._records or storage.open()
            names = self._records.keep(records.numpy()[rows])
        except (OSError, MemoryError) as error:
            self._keeps = False
            storage.say(
                f"no more is kept ({error}): for all other samples what rests is computed in every step"
            )
            return
        shelf.at.update(zip(new, names, strict=False))
        self._used += len(rows) * shelf.size
        storage.used += len(rows) * shelf.size

    def _try(
        self, compute: Compute, values: Sequence[Any], batch: int, step: int, made: dict[str, Any]
    ) -> bool:
        """Whether samples give the same among others, at other places, on other random streams."""
        samples = [batch - 1 - i // 2 for i in range(batch)]
        other = compute(self._some(values, batch, samples), ~step)
        self._tried = min(batch, 2)
        for send in self._resting.sent:
            dims = row_dims(send.spec) or []
            pairs = zip(tree_leaves(made[send.value]), tree_leaves(other[send.value]), dims, strict=True)
            if not all(close(pick(a, dim, batch, samples), b) for a, b, dim in pairs):
                return self._refuse(
                    f"'{send.value}' of '{send.owner}', which rests, is another one for a sample when others "
                    "are beside it, or in another step"
                )
        if self._stamp() != self._state:
            return self._refuse("a module that rests changes its state in eval mode")
        return True

    def _refuse(self, why: str) -> bool:
        self._refused = True
        self._storage.say(f"what rests is computed in every step: {why}")
        return False

    def _rows(self, values: Sequence[Any], batch: int) -> list[tuple[Tensor, int]] | None:
        """Return the tensors that the resting program reads, and along which dimension their samples lie."""
        given = dict(zip(self.plan.inputs, values, strict=True))
        found = [(leaf, dim) for name, dim in self._read.items() for leaf in tree_leaves(given[name])]
        for leaf, dim in found:
            if not isinstance(leaf, Tensor) or leaf.dim() <= dim or leaf.shape[dim] % batch:
                self._refuse("it reads a target that has no row for each sample")
                return None
        return found

    def _some(self, values: Sequence[Any], batch: int, samples: Sequence[int]) -> list[Any]:
        """Return the values of some of the samples."""
        found = dict(zip(self.plan.inputs, values, strict=True))
        for name, dim in self._read.items():
            found[name] = tree_map(partial(pick, dim=dim, batch=batch, samples=samples), found[name])
        return list(found.values())

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        """Return what changes when somebody writes to what rests."""
        return tuple((t.data_ptr(), t._version) for t in self._resting.tensors)


def _digests(rows: list[tuple[Tensor, int]], batch: int) -> tuple[bytes, list[bytes]]:
    """Return a digest of how the rows of a batch lie, and one of each sample."""
    common, parts = hashlib.blake2b(digest_size=16), []
    for tensor, dim in rows:
        layout = Layout.of(tensor, dim, batch)
        common.update(repr(layout).encode())
        parts.append(layout.apart(tensor.detach(), batch).cpu().numpy())
    found = []
    for i in range(batch):
        digest = common.copy()
        for part in parts:
            digest.update(part[i])
        found.append(digest.digest())
    return common.digest(), found


class Keeping:
    """The features of a fit: those of the phases of the stage under way."""

    def __init__(self, ir: TrainingGraph, coupled: Iterable[Coupling], storage: Storage) -> None:
        self._ir, self._coupled, self._storage = ir, tuple(coupled), storage
        self._stage = 0
        self._found: dict[str, Features | None] = {}

    def of(self, phase: Phase, plan: Plan) -> Features | None:
        """Return the features of a phase, or None where it has none; those of other stages go."""
        if phase.stage != self._stage:
            self.close()
        self._stage = phase.stage
        if phase.name not in self._found:
            self._found[phase.name] = self._features(phase, plan)
        return self._found[phase.name]

    def close(self) -> None:
        """Forget everything."""
        for features in self._found.values():
            if features is not None:
                features.close()
        self._found = {}

    def _features(self, phase: Phase, plan: Plan) -> Features | None:
        resting = at_rest(self._ir, plan, phase, self._coupled)
        if resting is None or phase.steps is not None:
            return None
        why = resting if isinstance(resting, str) else _without_rows(self._ir, resting)
        if not isinstance(resting, str) and why is None:
            return Features(phase, plan, resting, self._ir.captured.signature, self._storage)
        self._storage.say(f"in phase '{phase.name}' every step computes what rests: {why}")
        return None


def _without_rows(ir: TrainingGraph, resting: Resting) -> str | None:
    """Name a value that has no row for each sample among those that what rests reads or hands on."""
    first = resting.first
    for name in (n.name for n in ir.inputs):
        if name in first.read and row_dims(first.specs.get(name)) is None:
            return f"input '{name}' ({first.specs.get(name)}) has no row for each sample"
    for send in resting.sent:
        if row_dims(send.spec) is None:
            return f"'{send.value}' ({send.spec}), which '{send.owner}' hands on, has no row for each sample"
    return None
