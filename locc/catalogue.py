"""What is known of every registered method: its family, reference, options, and how modular it is."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from locc.compiler import compile
from locc.recipes import Recipe
from locc.registry import broken, load, registered
from locc.rewrite import Method, options


@dataclass(frozen=True)
class Option:
    """A hyper-parameter of a method, and where to search for a good value of it.

    Attributes:
        name: the keyword of `locc.compile`.
        default: what it is unless given.
        help: what it means.
        range: the lowest and the highest value worth trying, whole numbers where it is one; None if it has
            no such range.
        log: whether values are equally likely in their logarithm.
        choices: the values worth trying of one that is no number.
    """

    name: str
    default: Any
    help: str = ""
    range: tuple[float, float] | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def searchable(self) -> bool:
        """Whether it declares where to search."""
        return self.range is not None or bool(self.choices)

    @classmethod
    def of(cls, field: Field[Any]) -> Option:
        """Read the option that a field of a method declares."""
        given = field.metadata
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        choices = (False, True) if isinstance(default, bool) else tuple(given.get("choices", ()))
        log = given.get("scale") == "log"
        return cls(field.name, default, str(given.get("help", "")), given.get("range"), log, choices)


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a registered method.

    `recipe` is what `optimizer=None` means; `published` is the one that it was published with, the same
    unless that fails on common networks. `error` is why it cannot be loaded, or None. Where a whole package
    cannot be, its methods are not known, and it stands here itself.
    """

    name: str
    family: str
    reference: str
    summary: str
    options: dict[str, Option]
    recipe: Recipe
    published: Recipe
    package: str
    error: Exception | None = None

    @property
    def modularity(self) -> str:
        """The verdict of the certificate for this method on a chain of four layers, with default options.

        Compiles that chain, the first time. On another model, or with other options, the certificate of
        the compiled program is what counts.

        Raises:
            MethodError: the method is undefined on a chain of four linear layers.
        """
        return _modularity(self.name)


@cache
def _modularity(name: str) -> str:
    with torch.random.fork_rng():
        chain = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), nn.Linear(8, 8))
        program = compile(chain, name, ["0", "1", "2"], example_inputs=torch.zeros(4, 8), seed=0)
    return program.certificate.verdict


def methods() -> dict[str, MethodInfo]:
    """Return every registered method by id: family, reference, summary, recipe, options with their ranges.

    What cannot be loaded is among them, with its error: nothing of it, but all others, can be used.
    """
    found = {name: _broken(name, name, error) for name, error in broken().items()}
    for name, (_, package) in registered().items():
        try:
            found[name] = _info(name, package)
        except Exception as error:  # code of a third party
            found[name] = _broken(name, package, error)
    return dict(sorted(found.items()))


def _broken(name: str, package: str, error: Exception) -> MethodInfo:
    return MethodInfo(name, "", "", "", {}, Method.recipe, Method.recipe, package, error)


def _info(name: str, package: str) -> MethodInfo:
    cls = load(name)
    known = {key: Option.of(field) for key, field in options(cls).items()}
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    return MethodInfo(
        name, cls.family, cls.reference, summary, known, cls.recipe, cls.published or cls.recipe, package
    )
