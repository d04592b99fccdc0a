"""The optimizers' parameters: each in one optimizer, in memory of its own, and the owner's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, optim

from locc.facts.names import Names
from locc.ir import TrainingGraph
from locc.proof.findings import STORAGE, Finding
from locc.proof.static import overlapping
from locc.runtime.learner import Learner


def check(ir: TrainingGraph, learners: Mapping[str, Learner]) -> list[Finding]:
    """Return every parameter, or overlap in memory, that two owners' optimizers share."""
    names = Names.of(ir)
    optimizers = {owner: learner.optimizer for owner, learner in learners.items()}
    return [
        *_foreign(ir, optimizers, names),
        *_twice(optimizers, names),
        *_overlaps(optimizers, names),
        *_cleared(ir, learners, names),
    ]


def _cleared(ir: TrainingGraph, learners: Mapping[str, Learner], names: Names) -> Iterator[Finding]:
    """Yield every foreign parameter whose gradient an owner's update would clip, average and clear."""
    for owner, learner in learners.items():
        own = {id(p) for p in ir.parameters(owner).values()} if owner in ir.owners else set()
        for tensor in learner.parameters:
            if id(tensor) not in own:
                yield Finding(
                    STORAGE,
                    f"the update of '{owner}' clips and clears the gradient of '{_path(names, tensor)}', "
                    f"{names.home(tensor)}",
                    (),
                    None,
                    _path(names, tensor),
                    "give each learner the parameters of its own module",
                )


def held_by(optimizer: Any) -> list[Tensor]:
    """Return the tensors that an optimizer updates."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def fingerprint(optimizer: optim.Optimizer) -> list[Any]:
    """Return what differs once an optimizer's settings or state have changed; values that autograd counts."""
    tables = [*optimizer.param_groups, *optimizer.state.values()]
    return [
        (name, id(value), value._version) if isinstance(value, Tensor) else (name, value)
        for table in tables
        for name, value in table.items()
        if name != "params"
    ]


def _path(names: Names, tensor: Tensor) -> str:
    found = names.parameters.get(id(tensor))
    return found.path if found else f"a tensor of shape {list(tensor.shape)}"


def _foreign(ir: TrainingGraph, optimizers: Mapping[str, optim.Optimizer], names: Names) -> Iterator[Finding]:
    for owner, optimizer in optimizers.items():
        own = {id(p) for p in ir.parameters(owner).values()} if owner in ir.owners else set()
        for tensor in held_by(optimizer):
            if id(tensor) not in own:
                yield Finding(
                    STORAGE,
                    f"the optimizer of '{owner}' updates '{_path(names, tensor)}', {names.home(tensor)}; "
                    "weight decay and momentum would move it without a gradient",
                    (),
                    None,
                    _path(names, tensor),
                    "build each optimizer from the parameters it is given",
                )


def _twice(optimizers: Mapping[str, optim.Optimizer], names: Names) -> Iterator[Finding]:
    first: dict[int, str] = {}
    for owner, optimizer in optimizers.items():
        for tensor in held_by(optimizer):
            holder = first.setdefault(id(tensor), owner)
            if holder != owner:
                yield Finding(
                    STORAGE,
                    f"parameter '{_path(names, tensor)}' is in two optimizers, those of '{holder}' and "
                    f"'{owner}'",
                    (),
                    None,
                    _path(names, tensor),
                    "give it to one of them",
                )


def _overlaps(optimizers: Mapping[str, optim.Optimizer], names: Names) -> Iterator[Finding]:
    tensors: dict[int, tuple[str, Tensor]] = {}
    holder: dict[str, str] = {}
    for owner, optimizer in optimizers.items():
        for number, tensor in enumerate(held_by(optimizer)):
            found = names.parameters.get(id(tensor))
            name = found.path if found else f"{owner}[{number}]"
            tensors.setdefault(id(tensor), (name, tensor))
            holder.setdefault(name, owner)
    for one, other in overlapping(list(tensors.values())):
        yield Finding(
            STORAGE,
            f"parameter '{other}' of the optimizer of '{holder[other]}' shares memory with '{one}' of the "
            f"optimizer of '{holder[one]}'",
            (),
            None,
            other,
            "a view of a parameter is no parameter of its own: clone it, or leave it out of the optimizer",
        )
