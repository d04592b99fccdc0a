"""The assertion that a program is local, proved afresh."""

from __future__ import annotations

from typing import Any

from locc.errors import LocalityError
from locc.proof import Certificate, verify
from locc.runtime import Compiled


def assert_local(program: Compiled, x: Any = None, y: Any = None) -> Certificate:
    """Assert that no gradient and no state change of a program crosses a module boundary.

    Runs every check of `locc.verify` from the beginning; the program is bit for bit as it was afterwards,
    and `program.certificate` is the new one.

    Example:
        >>> program = locc.compile(model, "dgl", splits=["layer1", "layer2"], example_inputs=x)
        >>> certificate = locc.testing.assert_local(program)
        >>> assert certificate.verdict == "strictly modular"

    Args:
        program: a compiled program.
        x: a batch as `step` takes it; the example inputs of the compilation without one.
        y: its target; made up without one.

    Returns:
        The certificate.

    Raises:
        AssertionError: the program is not local, or a check could not be completed: it proves nothing.
        LoccError: there is nothing to run the program on.
    """
    try:
        certificate = verify(program, x, y)
    except LocalityError as error:
        raise AssertionError(str(error)) from error
    missing = [check for check in certificate.checks if check.status != "held"]
    if missing:
        shown = "\n".join(f"- {check.name}: {check.detail}" for check in missing)
        raise AssertionError(
            f"the program of method '{program.method}' is not proved local: {len(missing)} of "
            f"{len(certificate.checks)} checks could not be completed\n{shown}\n"
            "  remedy: give a batch of your own, assert_local(program, x, y)"
        )
    return certificate
