"""What is said of a step that stopped in its midst."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from locc.errors import LoccError, RunError
from locc.lower import Backward, Instruction
from locc.lower.instructions import instructions_of

MOST = 4
"""So many modules are named; of the others, the number is."""

OF_PYTORCH = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""What PyTorch raises for a batch that it cannot take."""


def non_finite(name: str, value: float, account: str) -> RunError:
    """Return the error for an objective that is not finite; `account` says what had moved by then."""
    owner, _, objective = name.rpartition(".")
    return RunError(
        f"objective '{objective}' of module '{owner}' is {value}; the step stopped before the module's "
        f"parameters changed. {account}. Lower the learning rate, clip gradients (clip=1.0), or look at this "
        "batch"
    )


def empty() -> RunError:
    """Return the error for a batch without samples: its losses would be nan."""
    return RunError("the batch is empty: the inputs have 0 samples; leave such a batch out of the data")


def account(moved: Iterable[str], atomic: bool) -> str:
    """Return which owners a step had updated when it stopped, as a sentence without its end."""
    names = list(dict.fromkeys(moved))
    if atomic:
        return "The whole step is undone (atomic=True)"
    if not names:
        return "No module has been updated"
    shown = ", ".join(f"'{name}'" for name in names[:MOST])
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"Updated before that: {shown}{more}; compile with atomic=True to undo them as well"


def explained(
    error: BaseException, at: Instruction | None, plan: Sequence[Instruction], told: str
) -> BaseException:
    """Return what to raise for an error inside of a step: a RunError that names the module for PyTorch's own.

    Any other (a class of the user's or of ours, an operating system's error) is somebody's to catch, as is
    what asks for a smaller batch (out of memory): it arrives as it is, with a note.
    """
    home = type(error).__module__.partition(".")[0]
    foreign = not isinstance(error, OF_PYTORCH) or home not in ("builtins", "torch")
    if foreign or at is None or isinstance(error, (LoccError, torch.OutOfMemoryError)):
        if not isinstance(error, RunError):
            error.add_note(f"locc: the step stopped. {told}")
        return error
    text = str(error).rstrip(". \n")
    return RunError(
        f"the step failed in module '{at.owner}'{_towards(at, plan)}: {type(error).__name__}: {text}. "
        f"{told}. Look at this batch: its number of samples (BatchNorm refuses one), its dtypes, its labels; "
        "the original error is the cause of this one"
    )


def _towards(at: Instruction, plan: Sequence[Instruction]) -> str:
    """Return the objective on the way to which an instruction runs, as a clause; empty where it has none."""
    flat = list(instructions_of(plan))
    rest = flat[next(i for i, one in enumerate(flat) if one is at) :]
    tasks = (i for i in rest if isinstance(i, Backward) and i.owner == at.owner and i.objectives)
    task = next(tasks, None)
    return "" if task is None else f", objective '{task.objectives[0].rpartition('.')[2]}'"
