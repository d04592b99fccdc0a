"""What a check finds, and how it is told to the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from locc.errors import LocalityError

REACHABILITY = "reachability on the graph"
WALK = "autograd walk"
SENTINEL = "sentinel run"
STORAGE = "optimizer storage"


@dataclass(frozen=True)
class Finding:
    """One way in which a program is not local.

    Attributes:
        check: which of the checks found it.
        text: one sentence that names the objective, what it reaches or changes, and both owners.
        path: what lies between the objective and the foreign tensor, objective first.
        objective: the objective's name (or the node's), or None where no objective is involved.
        tensor: the foreign parameter, buffer or value in the user's own path, or None.
        remedy: what to do about it.
    """

    check: str
    text: str
    path: tuple[str, ...] = ()
    objective: str | None = None
    tensor: str | None = None
    remedy: str = ""

    def __str__(self) -> str:
        lines = [f"{self.text} (found by {self.check})"]
        if self.path:
            lines.append("  path: " + " <- ".join(self.path))
        if self.remedy:
            lines.append("  remedy: " + self.remedy)
        return "\n".join(lines)


def refuse(name: str, findings: Sequence[Finding]) -> None:
    """Raise for findings, if there are any.

    Raises:
        LocalityError: lists the first findings; all of them are in its attribute `findings`.
    """
    if not findings:
        return
    # What the user wrote comes before the auxiliary networks that the method added.
    findings = sorted(findings, key=lambda f: (f.tensor or "").startswith("aux."))
    shown = "\n".join(f"- {finding}" for finding in findings[:5])
    more = f"\n- and {len(findings) - 5} more" if len(findings) > 5 else ""
    error = LocalityError(f"the program of method '{name}' is not local:\n{shown}{more}")
    error.findings = tuple(findings)
    raise error
