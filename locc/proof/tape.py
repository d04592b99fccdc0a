"""Walks autograd's own graph from a scalar to its leaves."""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_VIEWS = re.compile(
    r"^(T|Transpose|Permute|View|UnsafeView|Expand|ToCopy|Reshape(Alias)?|Unsqueeze|Squeeze|Slice|Select|Split|Alias|"
    r"Mul|Cat|Clone|AsStrided|Unbind)Backward"
)
_SUMS = re.compile(r"^(Add|Sub|Rsub|Cat|Stack|CopySlices|Where|IndexPut|MaskedFill|Copy)Backward|^CopySlices")
_SCALES = re.compile(r"^(Mul|Div)Backward")


@dataclass
class Tape:
    """Everything that a backward pass of one scalar would visit.

    `parent` maps each node to the one through which it was reached first; `leaves` maps the id of a
    leaf tensor to (tensor, its node).
    """

    parent: dict[Any, Any] = field(default_factory=dict)
    leaves: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, scalar: Tensor, known: Callable[[Tensor], Tensor] = lambda leaf: leaf) -> Tape:
        """Walk from `scalar.grad_fn` to every leaf, and note each under what it is `known` as."""
        tape = cls()
        start = scalar.grad_fn
        if start is None:
            if scalar.requires_grad:
                tape.leaves[id(scalar)] = (scalar, None)
            return tape
        tape.parent[start] = None
        todo = [start]
        while todo:
            node = todo.pop()
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                variable = known(variable)
                tape.leaves[id(variable)] = (variable, node)
            for following, _ in node.next_functions:
                if following is not None and following not in tape.parent:
                    tape.parent[following] = node
                    todo.append(following)
        return tape

    def path(self, node: Any) -> tuple[str, ...]:
        """Return the names of the nodes from the scalar to `node`, with the user's lines where recorded."""
        chain = []
        while node is not None:
            chain.append(_spell(node))
            node = self.parent.get(node)
        chain.reverse()
        return (*chain[:3], "...", *chain[-4:]) if len(chain) > 8 else tuple(chain)

    def passes_through_weights(self, leaf: Tensor, trained: Callable[[Tensor], bool]) -> bool:
        """Whether the gradient of the scalar with respect to `leaf` is multiplied by trained matrices.

        True where, on the way to the leaf, an operation also has a trained parameter of two or more
        dimensions as an operand, possibly through views. A sum multiplies nothing, and an elementwise
        product with a parameter of one dimension, such as LayerScale's [C,1,1], only scales.
        """
        found = self.leaves.get(id(leaf))
        end = found[1] if found is not None else leaf.grad_fn
        if end is None or end not in self.parent:
            return False
        return any(
            sibling is not None and sibling not in way and self._is_matrix(sibling, trained, node)
            for way in [self._ways_to(end)]
            for node in way
            if not _SUMS.match(node.name())
            for sibling, _ in node.next_functions
        )

    def _ways_to(self, target: Any) -> set[Any]:
        above: dict[Any, list[Any]] = {}
        for node in self.parent:
            for following, _ in node.next_functions:
                above.setdefault(following, []).append(node)
        way, todo = {target}, [target]
        while todo:
            for node in above.get(todo.pop(), []):
                if node not in way:
                    way.add(node)
                    todo.append(node)
        return way

    @staticmethod
    def _is_matrix(node: Any, trained: Callable[[Tensor], bool], product: Any) -> bool:
        least = 2 if _SCALES.match(product.name()) else 1
        todo, seen = [node], {node}
        while todo:
            step = todo.pop()
            variable = getattr(step, "variable", None)
            shape = variable.shape if isinstance(variable, Tensor) and trained(variable) else ()
            if sum(n >= least for n in shape) >= 2:
                return True
            if _VIEWS.match(step.name()):
                new = [n for n, _ in step.next_functions if n is not None and n not in seen]
                seen.update(new)
                todo += new
        return False


@dataclass
class Record:
    """Which owner made which node of autograd's graph, in which step, by sequence number."""

    starts: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, str, int]] = field(default_factory=list)

    def add(self, start: int, end: int, owner: str, step: int) -> None:
        """Note that the nodes numbered from `start` up to `end` were made by `owner`."""
        if end > start:
            self.starts.append(start)
            self.spans.append((start, end, owner, step))

    def maker(self, node: Any) -> tuple[str, int] | None:
        """Return the owner that made a node and the step in which it did, or None if neither is known."""
        if hasattr(node, "variable"):
            return None
        number = node._sequence_nr()
        i = bisect.bisect_right(self.starts, number) - 1
        if i >= 0 and self.spans[i][0] <= number < self.spans[i][1]:
            return self.spans[i][2], self.spans[i][3]
        return None


def sequence_number() -> int:
    """Return the number that the next node of autograd's graph gets on this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def _spell(node: Any) -> str:
    variable = getattr(node, "variable", None)
    if isinstance(variable, Tensor):
        return f"leaf {list(variable.shape)}"
    line = _line(node.metadata.get("traceback_")) if hasattr(node, "metadata") else None
    name = re.sub(r"Backward\d*$", "", node.name())
    return f"{name} ({line})" if line else name


def _line(trace: Any) -> str | None:
    """Return file:line of the user's code that ran an operation, or None where the compiler added it."""
    for entry in reversed(list(trace or [])):
        found = re.search(r'File "([^"]+)", line (\d+)', str(entry))
        if found and not found[1].startswith(_TORCH):
            inside = found[1].startswith((_HERE, "<"))
            return None if inside else f"{os.path.basename(found[1])}:{found[2]}"
    return None
