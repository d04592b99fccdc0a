"""One program of the kit, described by values: a model, a method, splits, an optimizer, a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locc.compiler import compile
from locc.errors import CaptureError, LoccError, MethodError, SplitError, nearest
from locc.program import Program
from locc.rewrite import Method
from locc.testing.families import ModelSpec

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


@dataclass(frozen=True)
class Case:
    """A program to test; its `repr` is Python that builds it again.

        case = Case(ModelSpec("residual", ("tanh", "dropout")), "dgl", splits=("stem", "blocks.0"))
        program = case.compile()
        program.step(*case.batch())

    Attributes:
        model: the model, its loss and its data.
        method: the id of a registered method, or a configured one (without `options` then).
        options: the method's own options.
        splits: submodules after which to cut, or the number of balanced modules.
        batch_size: number of samples B.
        optimizer: a key of `OPTIMIZERS`.
        schedule: "lockstep" or "sequential".
        seed: of auxiliaries, dropout and noise.
        tied: what becomes of a parameter that several modules use: "owner" or "copy".
        dynamic: whether lengths (sizes of images) may vary beside the batch.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    method: str | Method = "bp"
    options: Mapping[str, Any] = field(default_factory=dict)
    splits: tuple[str, ...] | int = ("stem",)
    batch_size: int = 2
    optimizer: str = "sgd"
    schedule: str = "lockstep"
    seed: int = 0
    tied: str = "owner"
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise LoccError(f"optimizer={self.optimizer!r} is unknown; {nearest(self.optimizer, OPTIMIZERS)}")

    def batch(self, number: int = 0, more: int = 0) -> tuple[Any, Tensor]:
        """Return batch `number`: inputs as `program.step` takes them, and their target.

        Args:
            number: which batch.
            more: by how much its sequences are longer (its images larger), where these may vary.
        """
        return self.model.batch(self.batch_size, number, more)

    def compile(self, **overrides: Any) -> Program:
        """Return a new program of a new model.

        Args:
            **overrides: arguments of `locc.compile` that replace those of the case.

        Raises:
            LoccError: as `locc.compile` does; a note on the error names the case.
        """
        arguments: dict[str, Any] = {
            "loss": self.model.criterion,
            "example_inputs": self.batch()[0],
            "dynamic": "auto" if self.dynamic else None,
            "optimizer": OPTIMIZERS[self.optimizer],
            "schedule": self.schedule,
            "tied": self.tied,
            "seed": self.seed,
            **self.options,
        }
        splits = self.splits if isinstance(self.splits, int) else list(self.splits)
        try:
            return compile(self.model.build(), self.method, splits, **arguments | overrides)
        except Exception as error:
            error.add_note(f"while compiling {self!r}")
            raise

    def refusal(self) -> str | None:
        """Return why method, schedule, splits=K or PyTorch do not admit the model; None where all do.

        Raises:
            LoccError: the case cannot be compiled for another reason.
        """
        try:
            program = self.compile(verify=False)
            return program.built.misfit(self.batch()[1], self.batch_size)
        except MethodError as error:
            if not undefined(error):
                raise
            return str(error)
        except SplitError as error:
            if not isinstance(self.splits, int):
                raise
            return str(error)  # fewer modules would train than are asked for
        except CaptureError as error:
            # Feedback layers open the blocks, and PyTorch before 2.13 exports no checkpoint that is open.
            if torch.__version__ >= "2.13" or "checkpoint" not in self.model.blocks:
                raise
            return str(error)
        return None


def undefined(error: MethodError) -> bool:
    """Whether an error says that a method or a schedule is undefined, rather than that something is wrong."""
    text = str(error)
    varies = "dynamic" in text  # what the method adds needs one size
    formulas = "has no gradients" in text  # a setting of gradients, where formulas set the weights
    return varies or formulas or "undefined on this model" in text or text.startswith("schedule='sequential'")
