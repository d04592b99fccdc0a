"""What is known of every registered method: its family, reference, options, and how modular it is."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from locc.compiler import compile
from locc.registry import load, registered
from locc.rewrite import options


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a registered method."""

    name: str
    family: str
    reference: str
    summary: str
    options: dict[str, Any]
    package: str

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
    """Return every registered method by id: family, reference, summary and options with defaults."""
    found = {}
    for name, (_, package) in sorted(registered().items()):
        cls = load(name)
        defaults = {
            key: f.default_factory() if f.default_factory is not MISSING else f.default
            for key, f in options(cls).items()
        }
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        found[name] = MethodInfo(name, cls.family, cls.reference, summary, defaults, package)
    return found
