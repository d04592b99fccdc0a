"""A pass does one rewrite; a method is a sequence of passes."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from locc.errors import GraphError, MethodError, nearest, once
from locc.ir.graph import TrainingGraph
from locc.ir.invariants import check
from locc.recipes import Recipe
from locc.rewrite.layout import guard_group_norms
from locc.rewrite.targets import specs

T = TypeVar("T")


class UndefinedError(MethodError):
    """A verb has found, in a rewrite, that the pass is undefined on this graph: its message is the reason."""


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of the training graph. The fields of the dataclass are its hyper-parameters."""

    @property
    def label(self) -> str:
        """The name in dumps and in the metadata of the nodes that the pass creates."""
        name = type(self).__name__
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Yield a sentence for each reason why the pass is undefined on this graph."""
        yield from ()

    @abstractmethod
    def rewrite(self, ir: TrainingGraph) -> None:
        """Change the graph in place."""

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Yield a sentence for each way in which the result is not what the pass promises."""
        yield from ()


@dataclass(frozen=True)
class Method(ABC):
    """A local-learning method: a declared sequence of passes.

    The fields of the dataclass are the method's hyper-parameters, and its options on the command line.
    `option` documents one; `locc.methods()` passes this on. A field that holds a callable or a network is
    left out of the command line.
    """

    family: ClassVar[str]
    reference: ClassVar[str]
    recipe: ClassVar[Recipe] = Recipe()
    """How it trains where the user gives no optimizer: as published, unless that fails on common networks."""
    published: ClassVar[Recipe | None] = None
    """The recipe that it was published with, where `recipe` is another."""
    opens: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layers that the method rewrites one by one: capture opens every module around them."""
    target: ClassVar[tuple[str, ...]] = ()
    """The kinds of target that the method itself can read (`CLASS_IDS`, `NUMBERS`); empty where the user's
    loss alone reads it. A loss that takes none of these is refused at compile time, another target before the
    step begins. With a single kind, `ir.target` has a spec."""

    schedule: ClassVar[str] = "lockstep"
    """The schedule that the method is published with."""
    ties: ClassVar[str] = "copy"
    """What `tied="auto"` means: "copy", which keeps each module's training its own, or "owner"."""

    @abstractmethod
    def passes(self) -> Sequence[Pass]:
        """Return the passes, in the order in which they run."""

    def opened(self, model: nn.Module, splits: Sequence[str]) -> Iterator[str]:
        """Yield the submodules that the method must see: capture opens every module around them.

        Those of the types in `opens`, unless a method knows better from where the model is cut.
        """
        yield from (name for name, module in model.named_modules() if name and isinstance(module, self.opens))

    def misfits(self, model: nn.Module) -> Iterator[str]:
        """Yield a sentence for each reason that can be told before the model is captured."""
        yield from ()

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Yield a sentence for each reason why the method is undefined on this partition."""
        yield from ()

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Yield a sentence, remedy included, for each reason why the method may train badly on this model.

        Args:
            ir: the graph after all passes.
            rates: the learning rate of each owner that trains.
        """
        yield from ()


def option(
    default: T,
    help: str,
    *,
    range: tuple[float, float] | None = None,
    scale: str = "linear",
    choices: Sequence[Any] = (),
) -> T:
    """Return a field of a method: an option with its meaning.

    Args:
        default: its value unless the user gives one.
        help: what it means.
        range: where to search for a good value; whole numbers where it is one.
        scale: "log" where its logarithm is to be searched evenly.
        choices: the values of one that is no number.
    """
    about = {"help": help, "range": range, "scale": scale, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=about)


def options(method: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """Return the options of a method by name."""
    return {f.name: f for f in dataclasses.fields(method) if f.init}


def configure(name: str, method: type[Method], given: dict[str, Any]) -> Method:
    """Build a method from its options.

    Raises:
        MethodError: an option is unknown, missing or has an unusable value.
    """
    known = options(method)
    for key in given:
        if key not in known:
            raise MethodError(
                f"method '{name}' has no option '{key}'; "
                + (nearest(key, known) if known else "it takes no options")
            )
    try:
        return method(**given)
    except ValueError as error:
        raise MethodError(f"method '{name}': {error}") from error
    except TypeError as error:
        values = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise MethodError(f"method '{name}' cannot be made with {values}: {error}") from error


def refuse_early(method: Method, name: str, model: nn.Module) -> None:
    """Refuse a model on which a method is undefined, before the time is spent to capture it.

    Raises:
        MethodError: it is, as far as `Method.misfits` tells.
    """
    _refuse(name, list(method.misfits(model)))


def apply(method: Method, name: str, ir: TrainingGraph) -> None:
    """Run the passes of a method, checking the invariants after each.

    With `LOCC_DUMP=dir` in the environment, the graph is written to `dir` after each pass.

    Raises:
        MethodError: the method, or a pass, is undefined on this graph.
        GraphError: a pass broke an invariant, or did not do what it promises.
    """
    _refuse(name, list(method.requires(ir)))
    if len(method.target) == 1:
        ir.target.meta["spec"] = next(iter(specs(method.target[0], ir.prediction.meta["spec"])), None)
    _dump(ir, 0, "partition")
    check(ir, "partition")
    for number, step in enumerate(method.passes(), start=1):
        _refuse(name, list(step.requires(ir)))
        with ir.making(step.label):
            try:
                step.rewrite(ir)
            except UndefinedError as error:
                _refuse(name, [str(error)])
        check(ir, step.label)
        ir.tidy()
        _dump(ir, number, step.label)
        broken = list(step.ensures(ir))
        if broken:
            raise GraphError(f"pass '{step.label}' did not do what it promises: {once(broken)}")
    guard_group_norms(ir)
    check(ir, "guard_group_norms")


def _refuse(name: str, reasons: list[str]) -> None:
    if reasons:
        raise MethodError(f"method '{name}' is undefined on this model: {once(reasons)}")


def _dump(ir: TrainingGraph, number: int, label: str) -> None:
    folder = os.environ.get("LOCC_DUMP")
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{number:03d}_{label}.py").write_text(str(ir))
