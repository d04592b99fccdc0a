"""What is known of every registered method: its family, reference, options, and how modular it is."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from locc.compiler import compile
from locc.registry import broken, load, registered
from locc.rewrite import options


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a registered method.

    `error` is why it cannot be loaded, or None. Where a whole package cannot be, its methods are not known,
    and it stands here itself.
    """

    name: str
    family: str
    reference: str
    summary: str
    options: dict[str, Any]
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
    """Return every registered method by id: family, reference, summary and options with defaults.

    What cannot be loaded is among them, with its error: nothing of it, but all others, can be used.
    """
    found = {name: MethodInfo(name, "", "", "", {}, name, error) for name, error in broken().items()}
    for name, (_, package) in registered().items():
        try:
            found[name] = _info(name, package)
        except Exception as error:  # code of a third party
            found[name] = MethodInfo(name, "", "", "", {}, package, error)
    return dict(sorted(found.items()))


def _info(name: str, package: str) -> MethodInfo:
    cls = load(name)
    defaults = {
        key: f.default_factory() if f.default_factory is not MISSING else f.default
        for key, f in options(cls).items()
    }
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    return MethodInfo(name, cls.family, cls.reference, summary, defaults, package)
